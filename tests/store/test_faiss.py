"""FAISS behind the store's interface, and exchange with its indexes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from memkern.store import MemoryStore

faiss = pytest.importorskip("faiss", reason="faiss is not installed (memkern[faiss])")


@pytest.mark.parametrize(
    ("index", "recall"), [("faiss-flat", 1.0), ("faiss-hnsw", 0.9), ("faiss-ivf", 0.5), ("SQ8", 0.8)]
)
def test_recall_against_the_exact_store(index: str, recall: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(2000, 16, generator=generator), torch.randn(50, 16, generator=generator)
    stores = [MemoryStore(16, index=kind) for kind in ("exact", index)]
    for store in stores:
        store.add_batch([""] * 2000, rows)
    exact, approximate = (store.search_batched(queries, 10) for store in stores)
    found = sum(len({h.id for h in a} & {h.id for h in e}) for a, e in zip(approximate, exact, strict=True)) / 500
    assert found >= recall


@pytest.mark.parametrize("index", ["faiss-flat", "faiss-hnsw", "faiss-ivf"])
def test_changes_filters_and_thresholds(index: str) -> None:
    store = MemoryStore(8, max_chunks=100, index=index)
    rows = torch.randn(150, 8)
    store.add_batch([str(i) for i in range(150)], rows, [{"even": i % 2 == 0} for i in range(150)])
    assert store.search(rows[149], 1)[0].id == 149
    store.delete(149)
    assert 149 not in {h.id for h in store.search(rows[149], 20)}
    store.update(100, embedding=rows[149])
    assert store.search(rows[149], 1)[0].id == 100
    assert all(h.metadata["even"] for h in store.search(rows[120], 10, filter={"even": True}))
    assert all(h.score >= 0.5 for h in store.search(rows[120], 50, threshold=0.5))


@pytest.mark.parametrize("index", ["faiss-flat", "faiss-hnsw", "faiss-ivf"])
def test_appended_rows_are_added_and_not_built_anew(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(8, index=index)
    rows = torch.randn(160, 8)
    store.add_batch([""] * 100, rows[:100])
    store.search(rows[0], 1)
    built: list[int] = []
    build = type(store._approximate)._build
    monkeypatch.setattr(
        type(store._approximate), "_build", lambda self, ring: (built.append(ring.size), build(self, ring))[1]
    )
    store.add_batch([""] * 50, rows[100:150])
    assert [hit.id for hit in store.search(rows[149], 1)] == [149]
    assert built == []
    store.delete(0)
    assert 0 not in {hit.id for hit in store.search(rows[0], 20)}
    assert built == [149]


@pytest.mark.parametrize("index", ["faiss-ivf", "faiss-hnsw", "IVF64,Flat", "PQ2x4", "Flat"])
def test_fewer_hits_only_where_there_are_fewer(index: str) -> None:
    """Untrained, with few allowed rows, and beyond the lists or neighbours that a search looks at."""
    store = MemoryStore(8, index=index)
    rows = torch.randn(500, 8)
    store.add("first", rows[0])
    assert len(store.search(rows[0], 3)) == 1
    store.add_batch([""] * 499, rows[1:], [{"rare": i == 7} for i in range(499)])
    assert [[hit.id for hit in hits] for hits in store.search_batched(rows[:4], 3, filter={"rare": True})] == [[8]] * 4
    assert len(store.search(rows[0], 500)) == 500
    cosines = torch.nn.functional.cosine_similarity(rows, rows[:1])
    assert len(store.range_search(rows[0], 0.3)) == int((cosines >= 0.3).sum())
    again = copy.deepcopy(store)
    again.clear()
    assert (len(store), again.search(rows[0])) == (500, [])


@pytest.mark.parametrize("index", ["faiss-flat", "faiss-hnsw", "IVF2,Flat"])
def test_ties_go_to_the_older_chunk(index: str) -> None:
    store = MemoryStore(8, 100, index=index)
    store.add_batch([""] * 90, torch.randn(90, 8))
    store.add_batch([""] * 30, torch.ones(30, 8))  # the ring wraps
    exact = MemoryStore.from_numpy(store.to_numpy()[1], ids=store.ids)
    for count in (3, 30, 40):
        found, expected = ([hit.id for hit in each.search(torch.ones(8), count)][:30] for each in (store, exact))
        assert found == expected


def test_export_and_import() -> None:
    store = MemoryStore(8)
    rows = torch.randn(20, 8)
    store.add_batch([str(i) for i in range(20)], rows, ids=list(range(100, 120)))
    index = store.to_faiss()
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()
    _, ids = index.search(unit[:3], 1)
    assert ids[:, 0].tolist() == [100, 101, 102]
    again = MemoryStore.from_faiss(index, store.chunks)
    assert again.ids == store.ids
    np.testing.assert_allclose(again.embeddings.numpy(), unit, atol=1e-6)
    hnsw = faiss.index_factory(8, "HNSW16")
    hnsw.add(unit)
    assert len(MemoryStore.from_faiss(hnsw)) == 20


def test_unknown_index_is_refused() -> None:
    for name in ("faiss-annoy", "NoSuchIndex7"):
        with pytest.raises(ValueError, match="index: "):
            MemoryStore(8, index=name)
