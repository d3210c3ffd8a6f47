"""What ``train``, ``evaluate`` and ``generate`` do for Self-RAG and hybrid models: plain text as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memkern.cli._common import write_json

FINAL = "final_model"
# Fields of a configuration that describe the data; the others belong to the trainer, and ``model`` to the model.
DATA = {
    "train_file": "pydoc",
    "eval_file": None,
    "tokenizer_name": None,
    "tokenizer_vocab_size": 2000,
    "passage_length": 64,
    "prompt_length": 16,
    "context_chunks": 4,
}


def train(fields: Mapping[str, Any], resume: Path | bool | None, out: Console) -> None:
    """Train from the fields of a configuration; perplexity with and without memory on held-out passages follows."""
    from memkern.training import RAGTrainer, RAGTrainingConfig
    from memkern.training import rag_corpus as corpus
    from memkern.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig

    own = dict(fields)
    data = {name: own.pop(name, default) for name, default in DATA.items()}
    model_fields = dict(own.pop("model", None) or {})
    hybrid = "backbone" in model_fields
    config = (HybridTrainingConfig if hybrid else RAGTrainingConfig).from_dict(own)
    texts = corpus.read_texts(data["train_file"])
    if data["tokenizer_name"] is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(data["tokenizer_name"])
    else:
        tokenizer = corpus.byte_pair_tokenizer((text for _, text in texts), data["tokenizer_vocab_size"])
    size, prompt, context = data["passage_length"], data["prompt_length"], data["context_chunks"]
    passages = corpus.cut(texts, tokenizer, size, 0 if data["eval_file"] else 10)
    train_items = corpus.items(passages, prompt, context, config.seed)
    if data["eval_file"]:
        others = corpus.cut(corpus.read_texts(data["eval_file"]), tokenizer, size, 0)
        eval_items = corpus.items(others, prompt, context, config.seed)
    else:
        eval_items = corpus.items(passages, prompt, context, config.seed, held_out=True)
    import torch

    torch.manual_seed(config.seed)
    model = _hybrid(model_fields, tokenizer) if hybrid else _self_rag(model_fields, tokenizer, size)
    count = sum(parameter.numel() for parameter in model.parameters())
    out.print(f"{count:,} parameters, {len(train_items)} passages to train on, {len(eval_items)} to evaluate on")
    trainer = (HybridTrainer if hybrid else RAGTrainer)(model, config, train_items, eval_items)  # type: ignore[arg-type]
    state = trainer.train(resume_from_checkpoint=_newest(Path(config.output_dir)) if resume is True else resume or None)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses:
        out.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {state.global_step} steps")
    scores = trainer.evaluate()
    show_scores(out, scores)
    folder = Path(config.output_dir)
    write_json(folder / "scores.json", scores)
    model.save_pretrained(folder / FINAL)
    config.to_json(folder / FINAL / "training_config.json")
    out.print(f"model: {folder / FINAL}")


def _self_rag(fields: Mapping[str, Any], tokenizer: Any, passage: int) -> Any:
    from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer

    own = {"vocab_size": len(tokenizer), **fields}
    preset = own.pop("preset", None)
    config = SelfRAGConfig(**own) if preset is None else SelfRAGConfig.from_preset(preset, **own)
    if config.max_seq_len < 2 * passage:
        raise ValueError(f"max_seq_len: expected at least two passages of {passage} tokens, got {config.max_seq_len}")
    return SelfRAGModel(SelfRAGTransformer(config), config=config, tokenizer=tokenizer)


def _hybrid(fields: Mapping[str, Any], tokenizer: Any) -> Any:
    """``backbone``: a folder with weights, or fields of a configuration with its ``model_type``."""
    from transformers import AutoModelForCausalLM

    from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel

    own = dict(fields)
    backbone = own.pop("backbone")
    if isinstance(backbone, str):
        base = AutoModelForCausalLM.from_pretrained(backbone)
        return HybridTransformerModel(HybridTransformerConfig(base.config, **own), tokenizer, base)
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **backbone}
    return HybridTransformerModel(HybridTransformerConfig(text, **own), tokenizer)


def _newest(folder: Path) -> Path:
    """The checkpoint of the most steps.

    Raises:
        FileNotFoundError: none there.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not found:
        raise FileNotFoundError(f"--resume: no checkpoint in {folder}")
    return found[-1]


def load(folder: Path) -> Any:
    """A saved Self-RAG or hybrid model with its tokenizer and its memory, ready to answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import memkern.models.hybrid
    import memkern.models.self_rag  # noqa: F401  registers the classes

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if hasattr(model, "external_memory") and (folder / "tokenizer_config.json").is_file():
        model.external_memory.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


def evaluate(model: Path, dataset: str, options: Mapping[str, Any], out: Console) -> dict[str, float]:
    """Perplexity of a text with and without memory; ``passage_length``, ``prompt_length`` and ``context_chunks`` count.

    Every passage's memory is the text around it; for Self-RAG retrieval of the passage before it is scored too.
    """
    from memkern.training import RAGTrainer, RAGTrainingConfig
    from memkern.training import rag_corpus as corpus
    from memkern.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig

    own = {name: value for name, value in options.items() if value is not None}
    for unused in ("split", "predictions"):
        own.pop(unused, None)
    limit = own.pop("limit", None)
    size, prompt, context = (
        own.pop(name, DATA[name]) for name in ("passage_length", "prompt_length", "context_chunks")
    )
    loaded = load(model)
    hybrid = hasattr(loaded, "external_memory")
    tokenizer = loaded.external_memory.tokenizer if hybrid else loaded.tokenizer
    passages = corpus.cut(corpus.read_texts(dataset), tokenizer, size, 0)
    items = corpus.items(passages, prompt, context, 0)[:limit]
    if not items:
        raise ValueError(f"{dataset}: shorter than one passage of {size} tokens")
    config = (HybridTrainingConfig if hybrid else RAGTrainingConfig).from_dict(own)
    trainer = (HybridTrainer if hybrid else RAGTrainer)(loaded, config, items)  # type: ignore[arg-type]
    scores = trainer.evaluate(items)
    show_scores(out, scores)
    return scores


def generate(
    model: Path, prompts: Sequence[str], memory: Sequence[Path], options: Mapping[str, Any], out: Console
) -> list[str]:
    """Continue each prompt; texts in ``memory`` are cut and written to the model's memory first."""
    loaded = load(model)
    hybrid = hasattr(loaded, "external_memory")
    tokenizer = loaded.external_memory.tokenizer if hybrid else loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer beside it")
    own = dict(options)
    use_memory = own.pop("use_memory")
    size = 64 if hybrid else loaded.config.chunk_size
    overlap = 0 if hybrid else loaded.config.chunk_overlap
    written = _remember(loaded, tokenizer, memory, size, overlap, hybrid)
    if memory:
        out.print(f"{written} chunks of {size} tokens in memory")
    texts = []
    for prompt in prompts:
        encoded = tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
        ids, mask = encoded["input_ids"].to(loaded.device), encoded["attention_mask"].to(loaded.device)
        flag = {"use_external_memory": use_memory} if hybrid else {"use_memory": use_memory}
        if not hybrid and use_memory and len(loaded.memory):
            for hit in loaded.retrieve(loaded.embed(ids, mask))[0]:
                out.print(f"  {hit.score:.3f}  {' '.join(hit.text.split())[:100]}", markup=False, soft_wrap=True)
        found = loaded.generate(ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **flag, **own)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        out.print(f"{prompt}[bold]{_plain(texts[-1])}[/]", soft_wrap=True)
    return texts


def _remember(loaded: Any, tokenizer: Any, memory: Sequence[Path], size: int, overlap: int, hybrid: bool) -> int:
    from memkern.data.chunkers import TextChunker
    from memkern.training.rag_corpus import read_texts

    chunker, count = TextChunker(size, overlap), 0
    for path in memory:
        for name, text in read_texts(str(path)):
            chunks = chunker.chunk_with_tokenizer(text, tokenizer)
            count += len(chunks)
            if hybrid:
                loaded.external_memory.add([chunk.text for chunk in chunks])
            else:
                tokens = [list(chunk.token_ids or ()) for chunk in chunks]
                loaded.write_to_memory([chunk.text for chunk in chunks], tokens, {"source": name})
    return count


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def show_scores(out: Console, scores: Mapping[str, float]) -> None:
    """One line each."""
    table = Table(box=None, show_header=False)
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    out.print(table)


__all__ = ["evaluate", "generate", "load", "show_scores", "train"]
