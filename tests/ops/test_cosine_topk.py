"""Cosine top-k on every backend against a float64 brute force: exactness, ties, edges.

A backend's own scores decide its order, so most tests ask two things of a result: it is sorted by (score descending,
index ascending), and no row that was left out beats an included one by more than float32 allows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkern
from memkern.ops import cosine_topk
from memkern.testing.topk import assert_exact, true_scores

pytestmark = pytest.mark.usefixtures("poison")

INF, NAN = float("inf"), float("nan")
# (Q, N, D, k) and why it is here.
SHAPES = {
    "plain": (5, 60, 32, 7),
    "one query": (1, 133, 48, 3),
    "few queries": (2, 70, 40, 9),
    "odd": (3, 67, 37, 5),  # tails in every axis
    "one row": (3, 1, 16, 1),
    "k is N": (3, 50, 20, 50),
    "k > N": (3, 4, 16, 9),
    "narrow": (6, 40, 1, 4),  # every score is 1 or -1, give or take a rounding
    "many queries": (70, 90, 24, 6),
    "wide": (2, 30, 777, 4),
    "many rows": (9, 3000, 8, 17),
    "large k": (2, 2100, 6, 2048),
}
SLOW = {"many rows", "large k", "many queries"}  # for the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("name", SHAPES)
def test_exact(backend: Any, search: Any, name: str) -> None:
    if backend.slow and name in SLOW:
        pytest.skip("large for the interpreter")
    made = search.arguments(SHAPES[name])
    found = search.run(made)
    assert found.scores.dtype == torch.float32
    assert_exact(found, true_scores(made["queries"], made["database"]), made["k"], made["database"].shape[1])


@pytest.mark.parametrize("normalized", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: Any, search: Any, dtype: torch.dtype, normalized: bool) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    for shape in (SHAPES["odd"], (20, 80, 33, 6)) if not backend.slow else (SHAPES["odd"],):
        made = search.arguments(shape, dtype)
        found = search.run(made, normalized=normalized)
        assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale: Any = 1.0
        if normalized:
            lengths = (made[name].double().norm(dim=-1) for name in ("queries", "database"))
            scale = torch.outer(*lengths)
        truth = true_scores(made["queries"], made["database"], normalized)
        assert_exact(found, truth, shape[3], shape[2], scale)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [2, 20])
def test_mixed_dtypes(backend: Any, search: Any, low: torch.dtype, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 67, 37, 5))
    for name in ("queries", "database"):
        mixed = {**made, name: made[name].to(low)}
        assert_exact(search.run(mixed), true_scores(mixed["queries"], mixed["database"]), 5, 37)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_ties_go_to_the_lower_index(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 12, 19, 30))
    made["database"] = made["database"].repeat(5, 1)
    found = search.run(made)
    copies = found.indices.view(count, 6, 5)
    assert torch.equal(copies, copies[..., :1] + 12 * torch.arange(5, device=backend.device))
    assert torch.equal(found.scores, found.scores.view(count, 6, 5)[..., :1].expand(-1, -1, 5).reshape(count, 30))
    truth = true_scores(made["queries"], made["database"])
    assert_exact(found, truth, 30, 19)


@pytest.mark.parametrize("count", [1, 20])
def test_one_row_many_times(backend: Any, search: Any, count: int) -> None:
    """Every score is the same: nothing can be told apart by score, however long the list of survivors gets."""
    count = search.sized(count)
    rows = 700 if backend.slow else 5000
    made = search.arguments((count, 1, 12, 9))
    made["database"] = made["database"].expand(rows, -1)
    found = search.run(made)
    assert torch.equal(found.indices, torch.arange(9, device=backend.device).expand(count, -1))


@pytest.mark.parametrize("count", [1, 20])
def test_each_row_better_than_the_last(backend: Any, search: Any, count: int) -> None:
    """The order in which every row survives, whatever bound was known before it."""
    count = search.sized(count)
    rows = 700 if backend.slow else 6000
    angle = torch.linspace(2.0, 0.1, rows, device=backend.device, dtype=torch.float64)
    database = torch.stack([angle.cos(), angle.sin()], 1).float()
    queries = torch.tensor([[1.0, 0.0]], device=backend.device).expand(count, -1)
    truth = true_scores(queries, database)
    for order in (database, database.flip(0)):
        found = cosine_topk(queries, order, 10, backend=backend.name)
        assert_exact(found, truth if order is database else truth.flip(1), 10, 2)


@pytest.mark.parametrize("k", [1, 70])
def test_rounding_that_leans_one_way(backend: Any, k: int) -> None:
    """A scan in bfloat16 sees the best row 2^-8 too low and others as much too high: the most that rounding can do."""
    rows, width, count = (700, 256, 2) if backend.slow else (4000, 256, 70)
    database = torch.randn(rows, width)
    database[:k] = 1 + 2**-8 + 2**-16
    database[:k, 3] = 0
    database[rows // 3] = 1 + 2**-8 - 2**-16
    database = database.to(backend.device)
    queries = torch.ones(count, width, device=backend.device)
    found = cosine_topk(queries, database, k, backend=backend.name)
    assert (found.indices[:, 0] == rows // 3).all()
    assert_exact(found, true_scores(queries, database), k, width)


@pytest.mark.parametrize("period", [31, 32])
def test_the_best_rows_repeat_with_a_period(backend: Any, period: int) -> None:
    """A sample of every so many rows may hold all of the best ones, or none."""
    rows, count, k = (700, 2, 40) if backend.slow else (7000, 9, 240)
    base = torch.randn(16)
    database = torch.randn(rows, 16)
    queries = (base + 0.1 * torch.randn(count, 16)).to(backend.device)
    for start in (0, 3):
        database[start::period] = base + 0.1 * torch.randn(database[start::period].shape)
        on = database.to(backend.device)
        assert_exact(cosine_topk(queries, on, k, backend=backend.name), true_scores(queries, on), k, 16)


@pytest.mark.parametrize("count", [1, 20])
def test_near_ties(backend: Any, search: Any, count: int) -> None:
    """Rows a few roundings apart, in float32 and in any coarser format that a pass may scan in."""
    count = search.sized(count)
    rows, width = (700 if backend.slow else 2500), 64
    base = torch.randn(width)
    base /= base.norm()
    for step in (2.0**-22, 2.0**-10) if backend.slow else (2.0**-22, 2.0**-16, 2.0**-10):
        database = (base + step * torch.randn(rows, width) / 8).to(backend.device)
        queries = (base + 0.3 * torch.randn(count, width) / 8).to(backend.device)
        found = cosine_topk(queries, database, 12, backend=backend.name)
        assert_exact(found, true_scores(queries, database), 12, width)
        if not backend.slow:
            # By its own scores exactly, which a search for all rows shows.
            whole = cosine_topk(queries[:2], database[:2048], 2048, backend=backend.name)
            prefix = cosine_topk(queries[:2], database[:2048], 12, backend=backend.name)
            assert torch.equal(whole.scores[:, :12], prefix.scores)
            assert torch.equal(whole.indices[:, :12], prefix.indices)


def test_zero_rows_and_queries_score_zero(backend: Any, search: Any) -> None:
    for count in (3, 20) if not backend.slow else (4,):
        made = search.arguments((count, 30, 16, 30))
        made["database"][[4, 9]] = 0
        made["queries"][1] = 0
        made["queries"][2] = -0.0
        found = search.run(made)
        assert_exact(found, true_scores(made["queries"], made["database"]), 30, 16)
        for row in (1, 2):
            assert not found.scores[row].any()
            assert not bool(found.scores[row].signbit().any())
            assert torch.equal(found.indices[row], torch.arange(30, device=backend.device))
        of_zero_rows = found.scores[(found.indices == 4) | (found.indices == 9)]
        assert not of_zero_rows.any()


def test_nan_never_wins(backend: Any, search: Any) -> None:
    for count in (3, 20) if not backend.slow else (4,):
        made = search.arguments((count, 30, 16, 30))
        made["database"][7, 3] = NAN
        made["database"][8, 0] = INF
        made["database"][9, 1] = -INF
        made["queries"][1, 2] = NAN
        found = search.run(made)
        truth = true_scores(made["queries"], made["database"])
        truth[:, 7:10] = NAN
        truth[1] = NAN
        assert_exact(found, truth, 30, 16)
        only = search.run({**made, "database": made["database"][7:8]})
        assert bool((only.indices == -1).all())
        assert bool((only.scores == -INF).all())


@pytest.mark.parametrize("scales", [(1e-30, 1.0), (1.0, 1e-30), (1e18, 1e18), (1e-25, 1e25), (3e-39, 1.0)], ids=str)
def test_norms_that_float32_cannot_square(backend: Any, search: Any, scales: tuple[float, float]) -> None:
    for count in (2, 20) if not backend.slow else (2, 3):
        made = search.arguments((count, 40, 16, 10))
        made["queries"] *= scales[0]
        made["database"] *= scales[1]
        made["database"][::2] *= 0.5
        found = search.run(made)
        if min(scales) < 1e-38:
            # Subnormal inputs have few digits and the GPU may flush them; the order is not asked for.
            assert bool(found.scores.isfinite().all())
            continue
        assert_exact(found, true_scores(made["queries"], made["database"]), 10, 16)


def test_rows_of_very_different_length(backend: Any, search: Any) -> None:
    """An inner product: the longest rows win, and their rounding is larger than the shortest rows' scores."""
    for count in (2, 20) if not backend.slow else (2, 3):
        made = search.arguments((count, 200, 24, 9))
        made["database"] *= torch.logspace(-6, 6, 200, device=backend.device)[torch.randperm(200)][:, None]
        scale = torch.outer(made["queries"].double().norm(dim=-1), made["database"].double().norm(dim=-1))
        truth = true_scores(made["queries"], made["database"], True)
        assert_exact(search.run(made, normalized=True), truth, 9, 24, scale)
        assert_exact(search.run(made), true_scores(made["queries"], made["database"]), 9, 24)


def test_clusters(backend: Any) -> None:
    """Rows that crowd around a few centres, with a query at each: many scores near the k-th."""
    rows = 200 if backend.slow else 4000
    centres = torch.randn(5, 48)
    database = centres[torch.randint(0, 5, (rows,))] + 0.02 * torch.randn(rows, 48)
    for count in (1, 3, 25) if not backend.slow else (1, 3):
        queries = centres[torch.arange(count) % 5] + 0.01 * torch.randn(count, 48)
        q, x = queries.to(backend.device), database.to(backend.device)
        for k in (1, 10, 100) if not backend.slow else (10,):
            found = cosine_topk(q, x, k, backend=backend.name)
            assert_exact(found, true_scores(q, x), k, 48)


@pytest.mark.parametrize("shape", [(0, 20, 8, 3), (4, 0, 8, 3), (0, 0, 8, 3), (3, 5, 0, 2)], ids=str)
def test_empty(backend: Any, search: Any, shape: Any) -> None:
    made = search.arguments(shape)
    for name in ("queries", "database"):
        made[name].requires_grad_()
    found = search.run(made)
    assert found.scores.shape == found.indices.shape == (shape[0], shape[3])
    if shape[1] == 0:
        assert bool((found.scores == -INF).all())
        assert bool((found.indices == -1).all())
    if shape[2] == 0:
        assert not found.scores.any()
        assert torch.equal(found.indices, torch.arange(2, device=backend.device).expand(3, -1))
    found.scores.sum().backward()
    for name in ("queries", "database"):
        assert made[name].grad.shape == made[name].shape
        assert not made[name].grad.any()
    side = cosine_topk(search.draw(0, 3, 4), search.draw(0, 5, 4), 2, backend=backend.name)
    assert side.scores.shape == (0, 3, 2)


def test_no_wrong_neighbour_in_larger_databases() -> None:
    """What ``benchmarks/systems/search_exactness.py`` does with millions of rows."""
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    from memkern.benchmarks.systems import search_exactness

    for verdict in search_exactness.check(20_000, 24, (2, 20), 10, "cpp"):
        assert verdict.wrong == verdict.other_bits == 0, verdict
