"""The same bits, however a search is batched, blocked, laid out in memory, threaded or repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import _cpu_gemm, cosine_topk, inverse_norms
from memkern.ops.cosine_topk import TopK
from memkern.testing.topk import same

pytestmark = pytest.mark.usefixtures("poison")

HOW = ["slice", "rows", "permuted", "offset"]  # see ``strided``


def test_same_bits_however_queries_are_batched(backend: Any, search: Any) -> None:
    shape = (6, 30, 21, 30) if backend.slow else (150, 400, 83, 400)
    for dtype in backend.dtypes[:2]:
        made = search.arguments(shape, dtype)
        whole = search.run(made)
        for size in (1, 5) if backend.slow else (1, 2, 3, 5, 9, 17, 33, 64, 149):
            for start in (0, shape[0] - size):
                part = {**made, "queries": made["queries"][start : start + size]}
                found = search.run(part)
                assert torch.equal(found.scores, whole.scores[start : start + size])
                assert torch.equal(found.indices, whole.indices[start : start + size])
            for k in (1, 7) if not backend.slow else (7,):
                few = search.run({**made, "queries": made["queries"][:size], "k": k})
                assert torch.equal(few.scores, whole.scores[:size, :k])
                assert torch.equal(few.indices, whole.indices[:size, :k])


@pytest.mark.parametrize("count", [1, 18])
def test_same_bits_however_rows_are_blocked(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 90, 29, 90))
    whole = search.run(made)
    scores = torch.empty(count, 90, device=backend.device).scatter_(1, whole.indices, whole.scores)
    for start, stop in ((0, 1), (7, 40), (39, 90)):
        part = search.run({**made, "database": made["database"][start:stop], "k": stop - start})
        assert torch.equal(part.scores, scores.gather(1, part.indices + start))


def test_searches_side_by_side(backend: Any, search: Any) -> None:
    databases = 2 if backend.slow else 3
    for count in (3,) if backend.slow else (3, 18):
        queries, database = search.draw(databases, count, 20), search.draw(databases, 50, 20)
        options = {
            "valid": torch.rand(databases, 50) > 0.2,
            "query_group": torch.randint(0, 2, (databases, count)),
            "row_group": torch.randint(0, 2, (databases, 50)),
        }
        options = {name: value.to(backend.device) for name, value in options.items()}
        pairs = (torch.rand(databases, count, 50) > 0.3).to(backend.device)
        norms = inverse_norms(database, backend=backend.name)
        for extra in ({}, options, {"valid": pairs}, {"inverse_norms": norms}):
            found = cosine_topk(queries, database, 7, **extra, backend=backend.name)
            assert found.scores.shape == found.indices.shape == (databases, count, 7)
            for g in range(databases):
                own = {name: value[g] for name, value in extra.items()}
                alone = cosine_topk(queries[g], database[g], 7, **own, backend=backend.name)
                assert same(TopK(found.scores[g], found.indices[g]), alone)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_strides(backend: Any, search: Any, strided: Any, count: int, how: str) -> None:
    count = search.sized(count)
    for dtype in (backend.dtypes[HOW.index(how) % 2],) if backend.slow else backend.dtypes[:2]:
        made = search.arguments((count, 60, 29, 8), dtype)
        other = {**made, "queries": strided(made["queries"], how), "database": strided(made["database"], how)}
        assert same(search.run(other), search.run(made))


def test_repeats_bit_for_bit(backend: Any, search: Any) -> None:
    made = search.arguments((6, 20, 17, 5) if backend.slow else (30, 40, 33, 9), grad=True)

    def once() -> list[torch.Tensor]:
        found = search.run(made)
        return [*found, *torch.autograd.grad(found.scores.square().sum(), [made["queries"], made["database"]])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 300])
def test_threads_do_not_change_the_bits(count: int, threads: int) -> None:
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    queries = torch.randn(count, 65, requires_grad=True)
    database = torch.randn(9000, 65, requires_grad=True)

    def once() -> list[torch.Tensor]:
        found = cosine_topk(queries, database, 20, backend="cpp")
        return [*found, *torch.autograd.grad(found.scores.square().sum(), [queries, database])]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = once()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(once(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [10, 64, 256])
@pytest.mark.parametrize("draw", ["any", "equal", "equal in the sample", "few values", "rising"])
def test_a_large_k_finds_what_a_query_finds_alone(k: int, draw: str) -> None:
    """Few queries are compared with every row in turn, many by samples and bounds: two ways to the same bits."""
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    queries, database = torch.randn(40, 33), torch.randn(9000, 33)
    if draw == "equal":
        database = database[:1].expand(9000, 33)
    elif draw == "equal in the sample":
        row = torch.arange(9000)
        equal = torch.isin(row % 31, torch.tensor([0, 6, 12, 18, 25])) | (row >= 8500)
        database = torch.where(equal[:, None], database[:1], -database[:1])
    elif draw == "few values":
        database = database[torch.randint(9, (9000,))]
    elif draw == "rising":
        database = database[(database @ queries[0]).argsort()]
    for options in ({}, {"min_score": 0.1}, {"normalized": True}, {"valid": torch.rand(40, 9000) > 0.3}):
        found = cosine_topk(queries, database, k, backend="cpp", **options)
        for i in (0, 21, 39):
            own = {**options, "valid": options["valid"][i : i + 1]} if "valid" in options else options
            alone = cosine_topk(queries[i : i + 1], database, k, backend="cpp", **own)
            assert torch.equal(found.indices[i], alone.indices[0])
            assert torch.equal(found.scores[i], alone.scores[0])
        if draw == "equal" and not options:
            assert (found.indices == torch.arange(k)).all()


@pytest.fixture
def library() -> Iterator[Callable[[int], int]]:
    """Sets from how many queries on a library multiplies."""
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    before = torch.ops.memkern.search_library_from(1 << 62)
    yield torch.ops.memkern.search_library_from
    torch.ops.memkern.search_library_from(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [7, 100])
def test_products_of_a_library_change_no_bit(library: Any, dtype: torch.dtype, k: int) -> None:
    """More than a tile of its rows, a width that is odd, rows that are scored apart, rows that lie close together."""
    queries, database = torch.randn(70, 37), torch.randn(2000, 37)
    database[::97] *= 1e-20
    database[5] = 0
    database[1000:] = database[1000] + 2e-2 * torch.randn(1000, 37)
    queries[3] = database[1200]
    queries, database = queries.to(dtype), database.to(dtype)
    for options in ({}, {"valid": torch.rand(2000) > 0.3}, {"min_score": 0.1}, {"normalized": True}):
        own = cosine_topk(queries, database, k, backend="cpp", **options)
        library(64)
        theirs = cosine_topk(queries, database, k, backend="cpp", **options)
        library(1 << 62)
        assert torch.equal(own.indices, theirs.indices)
        assert torch.equal(own.scores, theirs.scores)


def test_the_environment_may_ask_for_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cpu_gemm._entry("search", ("AuthenticAMD", 25, 17))["library_from_queries"] is None
    monkeypatch.setenv("MEMKERN_SEARCH_LIBRARY_FROM", "64")
    assert _cpu_gemm.search_library_from() == 64
    monkeypatch.setenv("MEMKERN_SEARCH_LIBRARY_FROM", "many")
    with pytest.raises(ValueError, match="MEMKERN_SEARCH_LIBRARY_FROM"):
        _cpu_gemm.search_library_from()


def test_arguments_are_not_changed(backend: Any, search: Any) -> None:
    made = search.arguments((3, 67, 37, 5), grad=True)
    copies = {name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)}
    search.run(made).scores.sum().backward()
    assert all(torch.equal(made[name], copy) for name, copy in copies.items())
