"""Embedders: unit rows, the same on every run, masks honoured; BM25 and retrieval metrics against worked examples."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from memkern.analysis import mean_reciprocal_rank, ndcg_at_k, recall_at_k, retrieval_report
from memkern.store import MemoryStore
from memkern.store.bm25 import BM25, reciprocal_rank_fusion
from memkern.store.embedders import HashingEmbedder, SentenceTransformerEmbedder, TransformersEmbedder, from_name

TEXTS = ["the cat sat on the mat", "a dog barks at the cat", "stock markets fell sharply today"]


def test_hashing_is_deterministic_and_lexical() -> None:
    embedder = HashingEmbedder(256)
    rows = embedder.encode([*TEXTS, ""])
    assert rows.shape == (4, 256)
    assert rows.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0])
    code = (
        "from memkern.store.embedders import HashingEmbedder; import sys\n"
        f"print(HashingEmbedder(256).encode({TEXTS[:1]!r})[0].nonzero().flatten().tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(rows[0].nonzero().flatten().tolist())
    query = HashingEmbedder(4096).fit(TEXTS)
    scores = query.encode(["why did the markets fall"], kind="query") @ query.encode(TEXTS).T
    assert scores.argmax().item() == 2
    with pytest.raises(ValueError, match="kind: expected one of"):
        embedder.encode(["x"], kind="passage")


def test_fitting_weighs_rare_words_more() -> None:
    embedder = HashingEmbedder(4096).fit(["common one", "common two", "common three"])
    rare, common = embedder.encode(["three"]), embedder.encode(["common"])
    both = embedder.encode(["common three"])
    assert (both @ rare.T).item() > (both @ common.T).item()


def tiny_encoder() -> TransformersEmbedder:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (memkern[models])")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (memkern[models])")
    words = sorted({w for text in TEXTS for w in text.split()})
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: i for i, word in enumerate(words, 2)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return TransformersEmbedder(transformers.BertModel(config), tokenizer, batch_size=2)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_ignores_padding(pooling: str, side: str) -> None:
    embedder = tiny_encoder()
    embedder.pooling, embedder.tokenizer.padding_side = pooling, side
    together = embedder.encode(["cat", "the dog sat on a mat today"])
    # BERT's absolute positions shift under left padding, so only right padding gives the same vector as alone.
    if side == "right":
        torch.testing.assert_close(together[0], embedder.encode(["cat"])[0], atol=1e-5, rtol=0)
    assert together.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert embedder.model.training, "the mode is put back"
    assert embedder.encode([]).shape == (0, 32)
    torch.testing.assert_close(embedder.encode("cat"), embedder.encode(["cat"])[0], atol=1e-5, rtol=0)


def test_transformers_prefers_embed_and_checks_arguments() -> None:
    embedder = tiny_encoder()
    with pytest.raises(ValueError, match="pooling: expected one of"):
        TransformersEmbedder(embedder.model, embedder.tokenizer, pooling="sum")
    with pytest.raises(ValueError, match="no padding token"):
        TransformersEmbedder(embedder.model, SimpleNamespace(pad_token_id=None))
    embedder.model.embed = lambda ids, mask: torch.ones(ids.shape[0], 32)
    assert torch.allclose(embedder.encode(["cat"]), torch.full((1, 32), 32**-0.5))


def test_sentence_transformer_prompts() -> None:
    seen: list[str] = []

    def encode(texts: list[str], **_: object) -> torch.Tensor:
        seen.extend(texts)
        return torch.eye(4)[: len(texts)]

    model = SimpleNamespace(prompts={"query": "query: "}, encode=encode, get_sentence_embedding_dimension=lambda: 4)
    embedder = SentenceTransformerEmbedder(model)
    assert embedder.encode(["a"], kind="query").shape == (1, 4)
    embedder.encode(["b"])
    assert seen == ["query: a", "b"]
    assert embedder.d_model == 4
    assert embedder.encode("c", kind="query").shape == (4,)
    assert seen[2:] == ["query: c"]


def test_from_name() -> None:
    assert from_name("hashing:64").d_model == 64
    for name in ("word2vec", "transformers:", "sentence"):
        with pytest.raises(ValueError, match="embedder: expected hashing"):
            from_name(name)


def test_bm25_and_fusion() -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed (memkern[search])")
    index = BM25(TEXTS, ids=["cat", "dog", "stocks"])
    assert index.search("markets today", 3)[0][0] == "stocks"
    assert [id for id, _ in index.search("cat", 3)] == ["cat", "dog"]
    assert [BM25(texts).search("cat") for texts in ([], ["", "..."], ["the"])] == [[]] * 3
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        index.search("cat", 0)
    with pytest.raises(ValueError, match="ids: expected 3, got 1"):
        BM25(TEXTS, ids=["x"])
    assert reciprocal_rank_fusion([["a", "b", "c"], ["b", "c", "a"]]) == ["b", "a", "c"]


def test_store_with_an_embedder_end_to_end() -> None:
    embedder = HashingEmbedder(512)
    store = MemoryStore(embedder.d_model)
    store.add_batch(TEXTS, embedder.encode(TEXTS))
    assert store.search(embedder.encode("dog", kind="query"), 1)[0].text == TEXTS[1]


def test_retrieval_metrics() -> None:
    ranked = [["a", "b", "c"], ["x", "y", "z"], ["q"]]
    relevant = [{"b"}, {"z", "x"}, {"none"}]
    assert recall_at_k(ranked, relevant, 1) == pytest.approx((0 + 0.5 + 0) / 3)
    assert recall_at_k(ranked, relevant, 3) == pytest.approx((1 + 1 + 0) / 3)
    assert mean_reciprocal_rank(ranked, relevant) == pytest.approx((0.5 + 1 + 0) / 3)
    first = (1 / 1.5849625) / 1
    second = (1 + 0.5) / (1 + 1 / 1.5849625)
    assert ndcg_at_k(ranked, relevant, 3) == pytest.approx((first + second) / 3)
    report = retrieval_report(ranked, relevant, ks=(1,))
    assert set(report) == {"recall@1", "ndcg@1", "mrr"}
    assert recall_at_k([["a"]], [set()], 1) == 0.0
    with pytest.raises(ValueError, match="relevant: expected 3 entries"):
        recall_at_k(ranked, relevant[:1], 1)
