"""The real text run in a few steps: what is held out stays out, and every arm is measured."""

from __future__ import annotations

import pytest

from memkern.training.rag_corpus import byte_pair_tokenizer, cut, items, read_texts
from memkern.training.rag_text import TextSettings, run_text


def test_held_out_passages_serve_in_no_item():
    texts = read_texts("pydoc")[:6]
    passages = cut(texts, byte_pair_tokenizer((text for _, text in texts), 400), 24)
    held_out = [tuple(p.tokens) for p in passages if p.held_out]
    assert len(held_out) == len(passages) // 10
    data = items(passages, prompt=8, context=3, seed=0)
    assert len(data) == len(passages) - len(held_out)
    unseen = set(held_out) - {tuple(p.tokens) for p in passages if not p.held_out}
    for item in data:
        texts_of_item = {tuple(item["input_ids"]), *map(tuple, item["context_chunks"])}
        assert not texts_of_item & unseen
        assert item["labels"][:8] == [-100] * 8
        assert item["labels"][8:] == item["input_ids"][8:]
    evaluated = items(passages, prompt=8, context=3, seed=0, held_out=True)
    assert sorted(tuple(item["input_ids"]) for item in evaluated) == sorted(held_out)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt"):
        read_texts(str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="folder"):
        read_texts(str(tmp_path))


def test_a_short_run_measures_every_arm():
    pytest.importorskip("bm25s")
    sizes = {"vocabulary": 400, "d_model": 16, "n_layers": 1, "d_ff": 16, "topics": 5}
    found = run_text(TextSettings(**sizes, steps=2, warmup_steps=1))
    for arm in ("none", "retrieved", "random", "neighbour"):
        assert found["perplexity"][f"perplexity, {arm}"] > 1
    for key in ("retrieval", "retrieval, question cut out of its passage"):
        assert found[key]["BM25"]["recall@5"] > found[key]["chance"]["recall@5"]
    assert (
        found["retrieval"]["BM25"]["recall@5"] > found["retrieval, question cut out of its passage"]["BM25"]["recall@5"]
    )
