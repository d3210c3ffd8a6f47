"""Self-RAG on real text: the documentation that every CPython carries as ``pydoc_data.topics``.

The text is cut into passages. The model reads the first third of a passage, retrieves other passages by it, and
predicts the rest. Every tenth passage is held out: it is never trained on, neither as a text nor as a chunk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memkern.analysis import retrieval_report
from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer
from memkern.store.bm25 import BM25
from memkern.training.rag_config import RAGTrainingConfig
from memkern.training.rag_corpus import PYDOC, Passage, byte_pair_tokenizer, cut, items, read_texts
from memkern.training.rag_trainer import RAGTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class TextSettings:
    """Sizes of the run; the defaults take minutes on one core."""

    vocabulary: int = 2000
    passage: int = 48  # tokens
    prompt: int = 16  # of them, given
    question: int = 12  # tokens of a passage that ask for it
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 2
    d_ff: int = 384
    top_k: int = 2
    context: int = 4  # chunks that an item brings along
    batch_size: int = 16
    warmup_steps: int = 300  # without memory
    steps: int = 700
    learning_rate: float = 2e-3
    contrastive_weight: float = 0.3
    topics: int | None = None  # only the first so many
    seed: int = 0


def documentation(settings: TextSettings) -> tuple[Any, list[Passage]]:
    """A byte-pair tokenizer trained on the documentation, and its passages in reading order."""
    texts = read_texts(PYDOC)[: settings.topics]
    tokenizer = byte_pair_tokenizer((text for _, text in texts), settings.vocabulary)
    return tokenizer, cut(texts, tokenizer, settings.passage)


def train(settings: TextSettings, say: Say = lambda text: None) -> tuple[SelfRAGModel, list[Passage]]:
    """Phase one and two of :class:`RAGTrainer` on the passages that are not held out."""
    tokenizer, passages = documentation(settings)
    torch.manual_seed(settings.seed)
    config = SelfRAGConfig(
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        d_ff=settings.d_ff,
        vocab_size=len(tokenizer),
        max_seq_len=4 * settings.passage,
        chunk_size=settings.passage,
        chunk_overlap=0,
        max_chunks=2 * len(passages),
        top_k=settings.top_k,
        dropout=0.1,
        contrastive_weight=settings.contrastive_weight,
    )
    model = SelfRAGModel(SelfRAGTransformer(config), config=config, tokenizer=tokenizer)
    trainer = RAGTrainer(
        model,
        RAGTrainingConfig(
            batch_size=settings.batch_size,
            gradient_accumulation_steps=1,
            learning_rate=settings.learning_rate,
            min_learning_rate=settings.learning_rate / 20,
            warmup_steps=50,
            max_steps=settings.steps,
            memory_warmup_steps=settings.warmup_steps,
            logging_steps=25,
            save_steps=0,
            eval_steps=0,
            progress_bar=False,
            seed=settings.seed,
        ),
        items(passages, settings.prompt, settings.context, settings.seed),
    )
    log = trainer._log

    def told(values: dict[str, float]) -> None:
        log(values)
        say(f"step {trainer.state.global_step}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))

    trainer._log = told  # type: ignore[method-assign]
    trainer.train()
    return model.eval(), passages


@torch.no_grad()
def perplexities(model: SelfRAGModel, passages: Sequence[Passage], settings: TextSettings) -> dict[str, float]:
    """Loss on the rest of held-out passages: without memory, with retrieval, with random chunks, with the neighbour.

    The store holds every other passage; the one that is predicted is never among what is read for it.
    """
    draw = random.Random(settings.seed)
    model.memory.clear()
    ids = model.write_to_memory([p.text for p in passages], [p.tokens for p in passages])
    assert isinstance(ids, list)
    place = {(p.source, p.number): id for p, id in zip(passages, ids, strict=True)}
    held_out = [p for p in passages if p.held_out and (p.source, p.number - 1) in place]
    totals = dict.fromkeys(("none", "retrieved", "random", "neighbour"), 0.0)
    for start in range(0, len(held_out), 32):
        block = held_out[start : start + 32]
        inputs = torch.tensor([p.tokens for p in block])
        labels = inputs.clone()
        labels[:, : settings.prompt] = -100
        hits: Any = model.retrieve(model.embed(inputs[:, : settings.prompt]), settings.top_k + 1)
        own = [place[p.source, p.number] for p in block]
        read: dict[str, Any] = {
            "none": [[] for _ in block],
            "retrieved": [
                [hit for hit in row if hit.id != id][: settings.top_k] for row, id in zip(hits, own, strict=True)
            ],
            "random": [
                [model.memory.get(i).token_ids for i in draw.sample(ids, settings.top_k + 1) if i != id][
                    : settings.top_k
                ]
                for id in own
            ],
            "neighbour": [[model.memory.get(place[p.source, p.number - 1]).token_ids] for p in block],
        }
        for arm, chunks in read.items():
            totals[arm] += float(model(inputs, labels=labels, retrieved=chunks).lm_loss) * len(block)
    losses = {arm: total / len(held_out) for arm, total in totals.items()}
    found = {f"loss, {arm}": loss for arm, loss in losses.items()}
    found |= {f"perplexity, {arm}": float(torch.tensor(loss).exp()) for arm, loss in losses.items()}
    return found | {"held-out passages": float(len(held_out))}


@torch.no_grad()
def retrieval(model: SelfRAGModel, passages: Sequence[Passage], settings: TextSettings, *, cut: bool) -> dict[str, Any]:
    """Which passage do a few of its tokens ask for? Asked about held-out passages, among all.

    By the model's embeddings, by BM25, and by chance.

    Args:
        cut: the tokens are taken out of the passage first, so that it does not hold its question.
    """
    draw = random.Random(settings.seed)
    places = [draw.randrange(settings.passage - settings.question) for _ in passages]
    asked = [i for i, p in enumerate(passages) if p.held_out]
    end = settings.question
    questions = [passages[i].tokens[places[i] : places[i] + end] for i in asked]
    rest = [
        p.tokens[:at] + p.tokens[at + end :] if p.held_out and cut else p.tokens
        for p, at in zip(passages, places, strict=True)
    ]
    model.memory.clear()
    tokenizer = model.tokenizer
    texts = [tokenizer.decode(tokens) for tokens in rest]
    ids = model.write_to_memory(texts, rest)
    assert isinstance(ids, list)
    hits: Any = model.retrieve(model.embed(torch.tensor(questions)), 10)
    index = BM25(texts, ids)
    relevant = [[ids[i]] for i in asked]
    ranked = {
        "model's embeddings": [[hit.id for hit in row] for row in hits],
        "BM25": [[id for id, _ in index.search(tokenizer.decode(question), 10)] for question in questions],
    }
    found: dict[str, Any] = {name: retrieval_report(rows, relevant, (1, 5, 10)) for name, rows in ranked.items()}
    found["chance"] = {f"recall@{k}": k / len(passages) for k in (1, 5, 10)}
    return found | {"questions": len(asked), "passages": len(passages)}


def run_text(settings: TextSettings | None = None, say: Say = lambda text: None) -> dict[str, Any]:
    """The whole run, for a JSON file."""
    settings = settings or TextSettings()
    start = time.process_time()
    model, passages = train(settings, say)
    say(f"{len(passages)} passages of {settings.passage} tokens, every tenth held out")
    seconds = time.process_time() - start
    content = {
        "about": "A tiny Self-RAG model trained from a random start for minutes on the Python documentation. "
        "Perplexity of the rest of held-out passages; recall of held-out passages by a few of their tokens.",
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_cpu_seconds": round(seconds, 1),
        "perplexity": perplexities(model, passages, settings),
        "retrieval": retrieval(model, passages, settings, cut=False),
        "retrieval, question cut out of its passage": retrieval(model, passages, settings, cut=True),
    }
    for name in list(content)[-3:]:
        say(f"{name}: {content[name]}")
    return content
