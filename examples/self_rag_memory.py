"""Give a language model a memory of texts: it retrieves by its own embeddings and reads what it found.

A tiny model is trained for a moment on the Python documentation, keeps passages of it, and continues a prompt with and
without them. Any causal LM of transformers takes the place of ``SelfRAGTransformer``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer
from memkern.training import RAGTrainer, RAGTrainingConfig
from memkern.training.rag_corpus import byte_pair_tokenizer, cut, items, read_texts


def main(steps: int = 200) -> None:
    texts = read_texts("pydoc")[:20]
    tokenizer = byte_pair_tokenizer((text for _, text in texts), 1000)
    passages = cut(texts, tokenizer, 32)

    torch.manual_seed(0)
    config = SelfRAGConfig(
        d_model=64, n_layers=2, n_heads=2, d_ff=128, vocab_size=len(tokenizer), max_seq_len=128, top_k=2
    )
    model = SelfRAGModel(SelfRAGTransformer(config), config=config, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = RAGTrainingConfig(
            batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=2e-3,
            warmup_steps=10,
            max_steps=steps,
            memory_warmup_steps=steps // 2,
            output_dir=folder,
            save_steps=0,
            progress_bar=False,
        )
        trainer = RAGTrainer(model, settings, items(passages, prompt=8, context=3, seed=0))
        trainer.train()
        held_out = items(passages, prompt=8, context=3, seed=0, held_out=True)
        print({name: round(value, 3) for name, value in trainer.evaluate(held_out).items()})

        model.eval()
        model.memory.clear()
        model.write_to_memory(
            [p.text for p in passages], [p.tokens for p in passages], [{"source": p.source} for p in passages]
        )
        prompt = tokenizer(["The with statement"], return_tensors="pt")["input_ids"]
        for hit in model.retrieve(model.embed(prompt))[0]:
            print(f"{hit.score:.3f} {hit.metadata['source']}: {' '.join(hit.text.split())[:70]}")
        for use_memory in (False, True):
            found = model.generate(prompt, use_memory=use_memory, max_new_tokens=12, do_sample=False)
            print(f"memory {use_memory}: {tokenizer.decode(found[0])!r}")

        model.save_pretrained(Path(folder) / "model")
        again = SelfRAGModel.from_pretrained(Path(folder) / "model")
        print(f"{len(again.memory)} chunks came back with the model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
