"""The memory store: what is added is found, ids are stable, ties and evictions go by age, bad input changes nothing."""

from __future__ import annotations

import math
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from memkern.store import MemoryStore, semantic_search
from memkern.store.embedders import HashingEmbedder


def filled(count: int, width: int = 8, **settings: object) -> tuple[MemoryStore, torch.Tensor]:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    store = MemoryStore(width, **settings)  # type: ignore[arg-type]
    store.add_batch([f"chunk {i}" for i in range(count)], rows)
    return store, rows


def test_add_search_get() -> None:
    store, rows = filled(20)
    hits = store.search(rows[7], top_k=3)
    assert [type(h.score) for h in hits] == [float] * 3
    assert hits[0].id == 7
    text, score = hits[0]
    assert text == "chunk 7"
    assert score == pytest.approx(1.0, abs=1e-6)
    chunk = store.get(7)
    assert chunk.text == "chunk 7"
    assert torch.equal(chunk.embedding, rows[7])
    expected = torch.nn.functional.cosine_similarity(rows[7][None], rows).topk(3)
    assert [h.id for h in hits] == expected.indices.tolist()
    assert [h.score for h in hits] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert len(store) == store.size == 20
    assert 7 in store
    assert 20 not in store
    assert [c.id for c in store] == list(range(20)) == store.ids
    assert store.chunks[3] == "chunk 3"
    assert torch.equal(store.embeddings, rows)


def test_metadata_defaults_do_not_touch_the_callers_dict() -> None:
    store = MemoryStore(4)
    mine = {"topic": "a", "position": "mine"}
    id = store.add("x", torch.ones(4), mine, token_ids=torch.tensor([1, 2]))
    assert mine == {"topic": "a", "position": "mine"}
    stored = store.get(id)
    assert stored.metadata["position"] == "mine"
    assert stored.metadata["topic"] == "a"
    assert set(stored.metadata) == {"topic", "position", "timestamp", "source"}
    assert stored.token_ids == [1, 2]
    other = store.add("y", torch.ones(4))
    assert store.get(other).metadata["position"] == 1
    stored.metadata["topic"] = "changed"
    assert store.get(id).metadata["topic"] == "a"


def test_filters_and_threshold() -> None:
    store = MemoryStore(2)
    for i in range(10):
        store.add(str(i), torch.tensor([1.0, i / 10]), {"kind": "even" if i % 2 == 0 else "odd", "n": i})
    query = torch.tensor([1.0, 0.0])
    assert [h.id for h in store.search(query, 3, filter={"kind": "odd"})] == [1, 3, 5]
    assert [h.id for h in store.search(query, 9, filter={"kind": "odd", "n": [3, 7, 8]})] == [3, 7]
    assert [h.id for h in store.search(query, 9, filter=lambda m: m["n"] > 7)] == [8, 9]
    assert store.search(query, 9, filter={"missing": 1}) == []
    exact = store.search(query, 10)[4].score
    assert len(store.search(query, 10, threshold=exact)) == 5
    assert [h.id for h in store.range_search(query, exact)] == [0, 1, 2, 3, 4]


def test_range_search_beyond_one_search() -> None:
    store = MemoryStore(3, max_chunks=5000)
    store.add_batch([""] * 5000, torch.tensor([1.0, 0, 0]).repeat(5000, 1))
    store.delete(17)
    hits = store.range_search(torch.tensor([2.0, 0, 0]), 0.5)
    assert [h.id for h in hits] == [i for i in range(5000) if i != 17]


def test_ties_go_to_the_older_chunk_after_the_ring_has_wrapped() -> None:
    store = MemoryStore(3, max_chunks=6)
    for _ in range(10):
        store.add("same", torch.tensor([1.0, 2, 3]))
    assert [h.id for h in store.search(torch.tensor([1.0, 2, 3]), 6)] == [4, 5, 6, 7, 8, 9]
    assert [h.id for h in store.search(torch.tensor([1.0, 2, 3]), 2)] == [4, 5]
    with pytest.raises(KeyError, match="evicted"):
        store.get(3)


def test_a_batch_larger_than_the_store_keeps_its_last_ones() -> None:
    store = MemoryStore(2, max_chunks=4)
    ids = store.add_batch([str(i) for i in range(11)], torch.randn(11, 2))
    assert ids == list(range(11))
    assert store.chunks == ["7", "8", "9", "10"]
    assert store.stats()["evicted"] == 7


def test_eviction_error() -> None:
    store = MemoryStore(2, max_chunks=2, eviction="error")
    store.add_batch(["a", "b"], torch.randn(2, 2))
    with pytest.raises(ValueError, match="store is full"):
        store.add("c", torch.randn(2))
    assert store.chunks == ["a", "b"]
    store.delete(0)
    store.add("c", torch.randn(2))
    assert store.chunks == ["b", "c"]


def test_ids() -> None:
    store = MemoryStore(2)
    assert store.add_batch(["a", "b"], torch.randn(2, 2), ids=[10, 3]) == [10, 3]
    assert store.add("c", torch.randn(2)) == 11
    for used in (10, 3, 11):
        with pytest.raises(ValueError, match="used before"):
            store.add("again", torch.randn(2), id=used)
    store.delete(3)
    with pytest.raises(ValueError, match="never reused"):
        store.add("again", torch.randn(2), id=3)
    assert store.add("free", torch.randn(2), id=4) == 4
    with pytest.raises(ValueError, match="used before"):
        store.add_batch(["x", "y"], torch.randn(2, 2), ids=[20, 20])
    assert 20 not in store
    store.clear()
    assert store.add("after", torch.randn(2)) == 12


def test_update_keeps_age_and_what_is_not_given() -> None:
    store = MemoryStore(2, max_chunks=2)
    store.add("a", torch.tensor([1.0, 0]), {"k": 1}, token_ids=[5])
    store.add("b", torch.tensor([0.0, 1]))
    store.update(0, embedding=torch.tensor([0.0, 3.0]))
    assert store.get(0).text == "a"
    assert store.get(0).token_ids == [5]
    assert [h.id for h in store.search(torch.tensor([0.0, 1.0]), 2)] == [0, 1]
    store.update(0, chunk="A", meta={"only": 1})
    assert store.get(0).metadata == {"only": 1}
    assert store.chunks == ["A", "b"]
    store.add("c", torch.tensor([1.0, 1]))
    assert 0 not in store
    with pytest.raises(KeyError):
        store.update(0, chunk="gone")


def test_delete_is_all_or_nothing() -> None:
    store, _ = filled(5)
    with pytest.raises(KeyError, match="99"):
        store.delete([1, 99])
    assert len(store) == 5
    store.delete([1, 3, 1])
    assert store.ids == [0, 2, 4]
    store.delete(0)
    assert store.ids == [2, 4]


def test_zero_embedding_scores_zero_and_nan_is_refused() -> None:
    store = MemoryStore(3)
    store.add("zero", torch.zeros(3))
    store.add("opposite", torch.tensor([-1.0, 0, 0]))
    hits = store.search(torch.tensor([1.0, 0, 0]), 5)
    assert [(h.text, h.score) for h in hits] == [("zero", 0.0), ("opposite", -1.0)]
    with pytest.raises(ValueError, match=r"expected finite values.*nan at index \(0, 1\)"):
        store.add("bad", torch.tensor([0.0, float("nan"), 0.0]))
    with pytest.raises(ValueError, match=r"inf at index \(1, 0\)"):
        store.add_batch(["a", "b"], torch.tensor([[0.0, 0, 0], [float("inf"), 0, 0]]))
    assert len(store) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.add("x", torch.ones(3)), ValueError, r"embedding: expected shape \(4\), got \[3\]"),
        (lambda s: s.add("x", torch.ones(1, 4)), ValueError, r"embedding: expected shape \(4\)"),
        (lambda s: s.add("x", torch.ones(4, dtype=torch.int64)), ValueError, "expected a floating dtype"),
        (lambda s: s.add_batch(["x"], torch.ones(2, 4)), ValueError, "embeddings: expected shape"),
        (lambda s: s.add_batch(["x"], torch.ones(1, 4), [None, None]), ValueError, "metas: expected 1, got 2"),
        (lambda s: s.add_batch(["x"], torch.ones(1, 4), ids=[]), ValueError, "ids: expected 1, got 0"),
        (lambda s: s.add("x", torch.ones(4), id=-1), ValueError, "ids >= 0"),
        (lambda s: s.add("x", torch.ones(4), id="a"), TypeError, "ids: expected ints"),
        (lambda s: s.add_batch([3], torch.ones(1, 4)), TypeError, "chunks: expected texts"),
        (lambda s: s.add_batch("ab", torch.ones(2, 4)), TypeError, "chunks: expected texts"),
        (lambda s: s.search(torch.ones(3)), ValueError, "query: expected shape"),
        (lambda s: s.search(None), TypeError, "query: expected a tensor"),
        (lambda s: s.search(torch.ones(4), filter="x"), TypeError, "filter: expected a dict or a function"),
        (lambda s: s.search(torch.ones(4), threshold="x"), TypeError, "threshold: expected a number"),
        (lambda s: s.range_search(torch.ones(4), math.nan), ValueError, "threshold: expected a number"),
        (lambda s: s.search(torch.ones(4), 0), ValueError, "top_k: expected at least 1, got 0"),
        (lambda s: s.add("x", torch.ones(4), 5), TypeError, "metas: expected a dict or None"),
        (lambda s: s.add("x", torch.ones(4), token_ids=["a"]), TypeError, "token_ids: expected ints"),
        (lambda s: s.add_batch(["x"], [[1.0], [1.0, 2.0]]), ValueError, "embeddings: expected a tensor"),
        (lambda s: s.delete(None), TypeError, "ids: expected an int or several"),
        (lambda s: s.merge(3), TypeError, "other: expected a MemoryStore"),
        (lambda s: MemoryStore(4, index=3), TypeError, "index: expected a str"),
        (lambda s: s.search(torch.ones(4), 2.5), TypeError, "top_k: expected an int"),
        (lambda s: s.get(5), KeyError, "no chunk has id 5"),
        (lambda s: MemoryStore(0), ValueError, "d_model: expected at least 1"),
        (lambda s: MemoryStore(4, 0), ValueError, "max_chunks: expected at least 1"),
        (lambda s: MemoryStore("4"), TypeError, "d_model: expected an int"),
        (lambda s: MemoryStore(4, dtype=torch.int8), ValueError, "dtype: expected one of"),
        (lambda s: MemoryStore(4, retrieval_method="euclid"), ValueError, "retrieval_method: expected one of"),
        (lambda s: MemoryStore(4, eviction="lru"), ValueError, "eviction: expected one of"),
        (lambda s: s.merge(MemoryStore(3)), ValueError, "other: expected d_model 4, got 3"),
    ],
)
def test_bad_input_changes_nothing(call: object, error: type[Exception], message: str) -> None:
    store = MemoryStore(4)
    with pytest.raises(error, match=message):
        call(store)  # type: ignore[operator]
    assert len(store) == 0
    assert store.add("fine", torch.ones(4)) == 0


def test_bad_input_evicts_and_updates_nothing() -> None:
    store = MemoryStore(4, 2)
    store.add_batch(["a", "b"], torch.eye(4)[:2])
    calls = [
        (lambda: store.add("c", torch.ones(4), "meta"), "metas"),
        (lambda: store.update(0, chunk="c", embedding=torch.ones(4), meta="meta"), "meta"),
        (lambda: store.update(0, embedding=torch.ones(4), chunk=3), "chunk"),
    ]
    for call, name in calls:
        with pytest.raises(TypeError, match=f"{name}: expected"):
            call()
        assert (store.chunks, store.ids) == (["a", "b"], [0, 1])
        assert torch.equal(store.embeddings, torch.eye(4)[:2])


def test_numbers_of_any_library() -> None:
    store = MemoryStore(np.int64(3), np.int32(100))
    store.add("list", [1, 0, 0])
    store.add("array", np.array([0, 1.0, 0]), id=np.int64(7))
    store.add_batch(["tensors", "reversed"], [torch.ones(3), torch.zeros(3)])
    store.add_batch(["x", "y"], np.eye(3)[::-1][:2], ids=np.array([20, 21]))
    assert store.add_batch([], []) == []
    assert store.ids == [0, 7, 8, 9, 20, 21]
    assert all(type(id) is int for id in store.ids)
    assert store.search([0, 0, 1], np.int64(1))[0].text == "x"
    assert [len(hits) for hits in semantic_search([torch.ones(3), torch.ones(3)], store, 2)] == [2, 2]
    assert semantic_search(np.array([0, 0, 1.0]), store, 1)[0][0]["corpus_id"] == 20
    store.delete(np.int64(20))
    store.delete(np.array([0, 7]))
    store.delete(torch.tensor([8]))
    assert store.ids == [9, 21]
    assert np.int64(9) in store
    assert store.get(np.int64(9)).text == "reversed"


def test_what_torch_is_set_to_changes_nothing(tmp_path: Path) -> None:
    """Inference mode, whose tensors cannot be written to later; another default dtype; another default device."""
    store = MemoryStore(3, retrieval_method="learned")
    with torch.inference_mode():
        store.clear()
        store.add("inference", torch.ones(3))
        store.save(tmp_path)
        loaded = [MemoryStore.load(tmp_path, mmap=mmap) for mmap in (False, True)]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        for each in (store, *loaded):
            each.add("defaults", [1, 0, 0])
            each.update(0, embedding=[0, 1, 0])
            each.save(tmp_path)
        made = MemoryStore(3, retrieval_method="learned")
        made.merge(MemoryStore.load(tmp_path, mmap=True))
        found = [each.search([1.0, 0, 0], 1, filter={"source": ""})[0] for each in (store, *loaded, made)]
        row = HashingEmbedder(8).encode("a word")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert [(hit.text, hit.score) for hit in found] == [("defaults", 1.0)] * 4
    assert (row.dtype, row.device.type) == (torch.float32, "cpu")
    assert made.to_numpy()[1].tolist() == [[0, 1, 0], [1, 0, 0]]


def test_records_compare_and_hash() -> None:
    store = MemoryStore(2)
    store.add_batch(["a", "b"], torch.eye(2), token_ids=[[1], None])
    assert list(store) == [store.get(0), store.get(1)]
    assert store.get(0) != store.get(1)
    assert len({store.get(0), store.get(0), *store.search([1.0, 0.0]), *store.search([1.0, 0.0])}) == 3
    before = store.get(0)
    store.update(0, embedding=[0.0, 1.0])
    assert (before != store.get(0), before != "a") == (True, True)


def test_a_filter_by_values_meets_metadata_that_is_a_list() -> None:
    store = MemoryStore(2)
    store.add_batch(["a", "b"], torch.eye(2), [{"tags": ["x", "y"]}, {"tags": "x"}])
    assert [hit.text for hit in store.search([1.0, 0.0], filter={"tags": ["x", "y"]})] == ["a", "b"]
    assert [hit.text for hit in store.search([1.0, 0.0], filter={"tags": {"x"}})] == ["b"]


def test_more_hits_than_one_search_of_the_operator_returns() -> None:
    store = MemoryStore(4, 5000)
    store.add_batch([""] * 4000, torch.randn(4000, 4))
    store.add_batch([""] * 2000, torch.randn(2000, 4))  # the ring wraps
    query = torch.randn(4)
    hits = store.search(query, 4500)
    assert hits[:2048] == store.search(query, 2048)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len({hit.id for hit in hits}) == 4500
    assert len(store.search(query, 10**6)) == 5000


def test_empty_store_and_empty_queries() -> None:
    store = MemoryStore(4)
    assert store.search(torch.ones(4)) == []
    assert store.search_batched(torch.ones(3, 4)) == [[], [], []]
    assert store.search_batched(torch.ones(0, 4)) == []
    assert store.embeddings.shape == (0, 4)
    assert list(store) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_methods(dtype: torch.dtype) -> None:
    rows = torch.randn(30, 16)
    for method in ("cosine", "dot", "learned"):
        store = MemoryStore(16, dtype=dtype, retrieval_method=method)
        store.add_batch([""] * 30, rows)
        kept = rows.to(dtype).double()
        query = rows[3].to(dtype).double()
        scores = kept @ query if method == "dot" else torch.nn.functional.cosine_similarity(query[None], kept)
        hits = store.search(rows[3], 5)
        assert [h.id for h in hits] == scores.topk(5).indices.tolist()
        assert [h.score for h in hits] == pytest.approx(scores.topk(5).values.tolist(), abs=1e-4)


def test_learned_scores_use_the_matrix() -> None:
    store = MemoryStore(2, retrieval_method="learned")
    store.add_batch(["x", "y"], torch.eye(2))
    assert store.search(torch.tensor([1.0, 0.0]), 1)[0].text == "x"
    store.score_matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert store.search(torch.tensor([1.0, 0.0]), 1)[0].text == "y"
    with pytest.raises(ValueError, match="score_matrix: expected"):
        store.score_matrix = torch.eye(3)
    with pytest.raises(ValueError, match="only retrieval_method='learned'"):
        MemoryStore(2).score_matrix = torch.eye(2)


def test_against_a_plain_model_over_thousands_of_random_operations() -> None:
    """A dict in order of age does the same, slowly; every hundred steps both answer the same search."""
    chance = random.Random(0)
    store, model = MemoryStore(4, max_chunks=50), {}
    generator = torch.Generator().manual_seed(0)
    for step in range(4000):
        action = chance.random()
        if action < 0.55 or not model:
            count = chance.choice([1, 1, 1, 3, 20])
            rows = torch.randint(-2, 3, (count, 4), generator=generator).float()
            ids = store.add_batch([str(step)] * count, rows)
            model.update(zip(ids, rows, strict=True))
            for old in list(model)[: max(0, len(model) - 50)]:
                del model[old]
        elif action < 0.85:
            gone = chance.sample(sorted(model), min(len(model), chance.choice([1, 1, 2, 9])))
            store.delete(gone)
            for id in gone:
                del model[id]
        else:
            id = chance.choice(sorted(model))
            model[id] = torch.randint(-2, 3, (4,), generator=generator).float()
            store.update(id, embedding=model[id])
        assert store.ids == list(model)
        if step % 100 == 0 and model:
            query = torch.randint(-2, 3, (4,), generator=generator).float()
            rows = torch.stack(list(model.values())).double()
            norms = (rows.norm(dim=1) * query.double().norm()).clamp(min=1e-300)
            scores = torch.where(rows.norm(dim=1) == 0, 0.0, (rows @ query.double()) / norms)
            hits = store.search(query, 7)
            assert [h.score for h in hits] == pytest.approx(scores.sort(descending=True).values[:7].tolist(), abs=1e-6)
            ages = {id: age for age, id in enumerate(model)}
            pairs = [(-round(h.score, 5), ages[h.id]) for h in hits]
            assert pairs == sorted(pairs)


def test_readers_beside_a_writer() -> None:
    """Each chunk's text names its vector; a reader never sees a text with another chunk's score."""
    store = MemoryStore(4, max_chunks=64)
    store.add_batch(["0"] * 64, torch.tensor([1.0, 0, 0, 0]).repeat(64, 1))
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for hit in store.search(torch.tensor([1.0, 0, 0, 0]), 8):
                expected = 1.0 if hit.text == "0" else 0.0
                if abs(hit.score - expected) > 1e-6:
                    failures.append(f"{hit.text} scored {hit.score}")
            list(store)
            store.to_numpy()

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for step in range(600):
        axis = step % 2
        store.add(str(axis), torch.nn.functional.one_hot(torch.tensor(axis), 4).float())
        if step % 7 == 0:
            store.delete(store.ids[0])
    done.set()
    for thread in readers:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in readers)
    assert failures == []


def test_merge_and_semantic_search() -> None:
    store, rows = filled(5)
    other, more = filled(3)
    other.update(1, meta={"kept": True})
    assert store.merge(other) == [5, 6, 7]
    assert store.get(6).metadata["kept"] is True
    assert torch.equal(store.embeddings, torch.cat([rows, more]))
    found = semantic_search(more[2], store, top_k=2)
    assert len(found) == 1
    assert found[0][0]["corpus_id"] == 7
    assert found[0][0]["score"] >= found[0][1]["score"]


def test_numpy_round_trip() -> None:
    store, rows = filled(6)
    store.delete(2)
    ids, array = store.to_numpy()
    again = MemoryStore.from_numpy(array, store.chunks, store.metadata, ids=ids)
    assert again.ids == [0, 1, 3, 4, 5]
    assert again.chunks == store.chunks
    assert torch.equal(again.embeddings, rows[[0, 1, 3, 4, 5]])
    with pytest.raises(ValueError, match=r"expected shape \(n, d_model\)"):
        MemoryStore.from_numpy(array[0])
