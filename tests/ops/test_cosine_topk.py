"""Cosine top-k on every backend against a float64 brute force: exactness, ties, filters, edges, bits.

A backend's own scores decide its order, so most tests ask two things of a result: it is sorted by (score descending,
index ascending), and no row that was left out beats an included one by more than float32 allows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import cosine_topk, inverse_norms
from memkern.ops.cosine_topk import TopK
from memkern.reference import cosine_topk as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

INF, NAN = float("inf"), float("nan")
U = 2.0**-24

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


@pytest.fixture(autouse=True)
def _declared(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, on a backend that does not implement the search."""
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if reason := memkern.backends.explain("cosine_topk")[backend.name]:
            pytest.skip(f"backend {backend.id}: {reason}")


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes the path for many queries with four of them; see :func:`sized`."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend").slow:
        monkeypatch.setattr("memkern.triton_kernels.cosine_topk.FEW_QUERIES", 2)


def sized(backend: Any, count: int) -> int:
    """A number of queries; small ones stand for both paths of the interpreter."""
    if backend.slow and count == 3:
        pytest.skip("the interpreter's 4 stand for it")
    return min(count, 4) if backend.slow else count


def draw(backend: Any, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size).to(backend.device, dtype)


def arguments(backend: Any, shape: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    count, rows, width, k = shape
    return {
        "queries": draw(backend, count, width, dtype=dtype),
        "database": draw(backend, rows, width, dtype=dtype),
        "k": k,
    }


def true_scores(queries: torch.Tensor, database: torch.Tensor, normalized: bool = False) -> torch.Tensor:
    """(Q, N) in float64; NaN where the row or the query is not finite."""
    q, x = queries.double(), database.double()
    if normalized:
        return q @ x.T
    largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # Scaled first: the square of 1e-200 is zero in float64 too.
    x = x / largest
    q = q / q.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    norms = q.norm(dim=-1)[:, None] * x.norm(dim=-1)
    return torch.where(norms == 0, 0.0, q @ x.T / torch.where(norms == 0, 1.0, norms))


def assert_exact(found: TopK, truth: torch.Tensor, k: int, width: int, scale: torch.Tensor | float = 1.0) -> None:
    """``truth`` (Q, N) float64 with NaN where a row is no candidate; ``scale`` is |q||x| (1 for cosines)."""
    scores, indices = found.scores.cpu(), found.indices.cpu()
    truth = truth.cpu()
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu().expand_as(truth)
    assert scores.shape == indices.shape == (truth.shape[0], k)
    assert indices.dtype == torch.int64
    u = 2.0**-53 if scores.dtype == torch.float64 else U
    for row in range(truth.shape[0]):
        candidate = ~truth[row].isnan()
        count = min(k, int(candidate.sum()))
        own, at = scores[row, :count].double(), indices[row, :count]
        assert bool((scores[row, count:] == -INF).all())
        assert bool((indices[row, count:] == -1).all())
        assert bool(((at >= 0) & (at < truth.shape[1])).all())
        assert bool(candidate[at].all()), "a row that is no candidate was found"
        assert at.unique().numel() == count, "a row was found twice"
        falls, level = own[1:] < own[:-1], own[1:] == own[:-1]
        assert bool((falls | (level & (at[1:] > at[:-1]))).all()), "not by (score descending, index ascending)"
        bound = (width + 2) * u * scale[row]
        assert bool(((own - truth[row, at]).abs() <= bound[at] + 1e-300).all()), "a score is wrong"
        left = candidate.clone()
        left[at] = False
        if count and bool(left.any()):
            worst = truth[row, at].min()
            wrong = (truth[row] - worst > 2 * bound + 1e-300) & left
            assert not bool(wrong.any()), f"query {row}: {int(wrong.sum())} rows left out beat an included one"


def run(backend: Any, made: dict[str, Any], **options: Any) -> TopK:
    return cosine_topk(**{**made, **options}, backend=backend.name)


def same(a: TopK, b: TopK) -> bool:
    return torch.equal(a.scores, b.scores) and torch.equal(a.indices, b.indices)


@pytest.mark.parametrize("name", SHAPES)
def test_exact(backend: Any, name: str) -> None:
    if backend.slow and name in SLOW:
        pytest.skip("large for the interpreter")
    made = arguments(backend, SHAPES[name])
    found = run(backend, made)
    assert found.scores.dtype == torch.float32
    assert_exact(found, true_scores(made["queries"], made["database"]), made["k"], made["database"].shape[1])


@pytest.mark.parametrize("normalized", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: Any, dtype: torch.dtype, normalized: bool) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    for shape in (SHAPES["odd"], (20, 80, 33, 6)) if not backend.slow else (SHAPES["odd"],):
        made = arguments(backend, shape, dtype)
        found = run(backend, made, normalized=normalized)
        assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale: Any = 1.0
        if normalized:
            lengths = (made[name].double().norm(dim=-1) for name in ("queries", "database"))
            scale = torch.outer(*lengths)
        truth = true_scores(made["queries"], made["database"], normalized)
        assert_exact(found, truth, shape[3], shape[2], scale)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [2, 20])
def test_mixed_dtypes(backend: Any, low: torch.dtype, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 67, 37, 5))
    for name in ("queries", "database"):
        mixed = {**made, name: made[name].to(low)}
        assert_exact(run(backend, mixed), true_scores(mixed["queries"], mixed["database"]), 5, 37)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_ties_go_to_the_lower_index(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 12, 19, 30))
    made["database"] = made["database"].repeat(5, 1)
    found = run(backend, made)
    copies = found.indices.view(count, 6, 5)
    assert torch.equal(copies, copies[..., :1] + 12 * torch.arange(5, device=backend.device))
    assert torch.equal(found.scores, found.scores.view(count, 6, 5)[..., :1].expand(-1, -1, 5).reshape(count, 30))
    truth = true_scores(made["queries"], made["database"])
    assert_exact(found, truth, 30, 19)


@pytest.mark.parametrize("count", [1, 20])
def test_one_row_many_times(backend: Any, count: int) -> None:
    """Every score is the same: nothing can be told apart by score, however long the list of survivors gets."""
    count = sized(backend, count)
    rows = 700 if backend.slow else 5000
    made = arguments(backend, (count, 1, 12, 9))
    made["database"] = made["database"].expand(rows, -1)
    found = run(backend, made)
    assert torch.equal(found.indices, torch.arange(9, device=backend.device).expand(count, -1))


@pytest.mark.parametrize("count", [1, 20])
def test_each_row_better_than_the_last(backend: Any, count: int) -> None:
    """The order in which every row survives, whatever bound was known before it."""
    count = sized(backend, count)
    rows = 700 if backend.slow else 6000
    angle = torch.linspace(2.0, 0.1, rows, device=backend.device, dtype=torch.float64)
    database = torch.stack([angle.cos(), angle.sin()], 1).float()
    queries = torch.tensor([[1.0, 0.0]], device=backend.device).expand(count, -1)
    truth = true_scores(queries, database)
    for order in (database, database.flip(0)):
        found = cosine_topk(queries, order, 10, backend=backend.name)
        assert_exact(found, truth if order is database else truth.flip(1), 10, 2)


@pytest.mark.parametrize("count", [1, 20])
def test_near_ties(backend: Any, count: int) -> None:
    """Rows a few roundings apart, in float32 and in any coarser format that a pass may scan in."""
    count = sized(backend, count)
    rows, width = (700 if backend.slow else 2500), 64
    base = torch.randn(width)
    base /= base.norm()
    for step in (2.0**-22, 2.0**-16, 2.0**-10):
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


def test_same_bits_however_queries_are_batched(backend: Any) -> None:
    shape = (6, 40, 21, 40) if backend.slow else (150, 400, 83, 400)
    for dtype in backend.dtypes[:2]:
        made = arguments(backend, shape, dtype)
        whole = run(backend, made)
        for size in (1, 5) if backend.slow else (1, 2, 3, 5, 9, 17, 33, 64, 149):
            for start in (0, shape[0] - size):
                part = {**made, "queries": made["queries"][start : start + size]}
                found = run(backend, part)
                assert torch.equal(found.scores, whole.scores[start : start + size])
                assert torch.equal(found.indices, whole.indices[start : start + size])
            for k in (1, 7) if not backend.slow else (7,):
                few = run(backend, {**made, "queries": made["queries"][:size], "k": k})
                assert torch.equal(few.scores, whole.scores[:size, :k])
                assert torch.equal(few.indices, whole.indices[:size, :k])


@pytest.mark.parametrize("count", [1, 18])
def test_same_bits_however_rows_are_blocked(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 90, 29, 90))
    whole = run(backend, made)
    scores = torch.empty(count, 90, device=backend.device).scatter_(1, whole.indices, whole.scores)
    for start, stop in ((0, 1), (7, 40), (39, 90)):
        part = run(backend, {**made, "database": made["database"][start:stop], "k": stop - start})
        assert torch.equal(part.scores, scores.gather(1, part.indices + start))


def test_zero_rows_and_queries_score_zero(backend: Any) -> None:
    for count in (3, 20) if not backend.slow else (4,):
        made = arguments(backend, (count, 30, 16, 30))
        made["database"][[4, 9]] = 0
        made["queries"][1] = 0
        made["queries"][2] = -0.0
        found = run(backend, made)
        assert_exact(found, true_scores(made["queries"], made["database"]), 30, 16)
        for row in (1, 2):
            assert not found.scores[row].any()
            assert not bool(found.scores[row].signbit().any())
            assert torch.equal(found.indices[row], torch.arange(30, device=backend.device))
        of_zero_rows = found.scores[(found.indices == 4) | (found.indices == 9)]
        assert not of_zero_rows.any()


def test_nan_never_wins(backend: Any) -> None:
    for count in (3, 20) if not backend.slow else (4,):
        made = arguments(backend, (count, 30, 16, 30))
        made["database"][7, 3] = NAN
        made["database"][8, 0] = INF
        made["database"][9, 1] = -INF
        made["queries"][1, 2] = NAN
        found = run(backend, made)
        truth = true_scores(made["queries"], made["database"])
        truth[:, 7:10] = NAN
        truth[1] = NAN
        assert_exact(found, truth, 30, 16)
        only = run(backend, {**made, "database": made["database"][7:8]})
        assert bool((only.indices == -1).all())
        assert bool((only.scores == -INF).all())


@pytest.mark.parametrize("count", [1, 4, 20])
def test_valid(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 90, 24, 8))
    truth = true_scores(made["queries"], made["database"])
    for keep in (0.5, 0.05, 0.0):
        per_row = (torch.rand(90) < keep).to(backend.device)
        per_pair = (torch.rand(count, 90) < keep).to(backend.device)
        assert_exact(run(backend, made, valid=per_row), truth.where(per_row, NAN), 8, 24)
        assert_exact(run(backend, made, valid=per_pair), truth.where(per_pair, NAN), 8, 24)
        strided = per_pair.t().contiguous().t()
        assert same(run(backend, made, valid=strided), run(backend, made, valid=per_pair))


def test_a_filtered_row_reaches_nothing(backend: Any) -> None:
    made = arguments(backend, (3, 30, 16, 5))
    valid = torch.ones(30, dtype=torch.bool, device=backend.device)
    valid[4] = False
    expected = run(backend, made, valid=valid)
    made["database"][4] = NAN
    made["database"].requires_grad_()
    found = run(backend, made, valid=valid)
    assert same(found, expected)
    found.scores.sum().backward()
    assert bool(made["database"].grad.isfinite().all())
    assert not made["database"].grad[4].any()


@pytest.mark.parametrize("count", [1, 4, 20])
def test_groups(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 80, 24, 6))
    truth = true_scores(made["queries"], made["database"])
    query_group = torch.randint(0, 5, (count,)).to(backend.device)
    row_group = torch.randint(0, 4, (80,)).to(backend.device)
    far = 1 << 40  # ids are compared as int64
    query_group[0], row_group[:3] = far + 1, far
    row_group[3] = far + 1
    same_group = query_group[:, None] == row_group
    groups = {"query_group": query_group, "row_group": row_group}
    assert_exact(run(backend, made, **groups), truth.where(same_group, NAN), 6, 24)
    valid = (torch.rand(80) > 0.5).to(backend.device)
    assert_exact(run(backend, made, **groups, valid=valid), truth.where(same_group & valid, NAN), 6, 24)


@pytest.mark.parametrize("count", [1, 20])
def test_min_score_keeps_an_equal_score(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 60, 24, 20))
    every = run(backend, made)
    bound = float(every.scores[0, 5])
    for limit, kept in ((bound, 6), (math.nextafter(bound, 2.0), 5)):
        found = run(backend, made, min_score=limit)
        if limit != bound:
            # A float32 score is compared with the bound as float32 holds it.
            limit = float(torch.tensor(limit))
            kept = 5 if limit > bound else 6
        assert int((found.indices[0] >= 0).sum()) == kept
        keep = every.scores >= limit
        assert torch.equal(found.indices, torch.where(keep, every.indices, -1))
        assert torch.equal(found.scores, torch.where(keep, every.scores, -INF))
    none = run(backend, made, min_score=1.5)
    assert bool((none.indices == -1).all())
    inner = run(backend, made, normalized=True)
    bound = float(inner.scores[0, 3])
    assert int((run(backend, made, normalized=True, min_score=bound).indices[0] >= 0).sum()) == 4


@pytest.mark.parametrize("scales", [(1e-30, 1.0), (1.0, 1e-30), (1e18, 1e18), (1e-25, 1e25), (3e-39, 1.0)], ids=str)
def test_norms_that_float32_cannot_square(backend: Any, scales: tuple[float, float]) -> None:
    for count in (2, 20) if not backend.slow else (2, 3):
        made = arguments(backend, (count, 40, 16, 10))
        made["queries"] *= scales[0]
        made["database"] *= scales[1]
        made["database"][::2] *= 0.5
        found = run(backend, made)
        if min(scales) < 1e-38:
            # Subnormal inputs have few digits and the GPU may flush them; the order is not asked for.
            assert bool(found.scores.isfinite().all())
            continue
        assert_exact(found, true_scores(made["queries"], made["database"]), 10, 16)


def test_rows_of_very_different_length(backend: Any) -> None:
    """An inner product: the longest rows win, and their rounding is larger than the shortest rows' scores."""
    for count in (2, 20) if not backend.slow else (2, 3):
        made = arguments(backend, (count, 200, 24, 9))
        made["database"] *= torch.logspace(-6, 6, 200, device=backend.device)[torch.randperm(200)][:, None]
        scale = torch.outer(made["queries"].double().norm(dim=-1), made["database"].double().norm(dim=-1))
        truth = true_scores(made["queries"], made["database"], True)
        assert_exact(run(backend, made, normalized=True), truth, 9, 24, scale)
        assert_exact(run(backend, made), true_scores(made["queries"], made["database"]), 9, 24)


def test_searches_side_by_side(backend: Any) -> None:
    for count in (3, 18) if not backend.slow else (3,):
        queries, database = draw(backend, 3, count, 20), draw(backend, 3, 50, 20)
        options = {
            "valid": torch.rand(3, 50) > 0.2,
            "query_group": torch.randint(0, 2, (3, count)),
            "row_group": torch.randint(0, 2, (3, 50)),
        }
        options = {name: value.to(backend.device) for name, value in options.items()}
        pairs = (torch.rand(3, count, 50) > 0.3).to(backend.device)
        norms = inverse_norms(database, backend=backend.name)
        for extra in ({}, options, {"valid": pairs}, {"inverse_norms": norms}):
            found = cosine_topk(queries, database, 7, **extra, backend=backend.name)
            assert found.scores.shape == found.indices.shape == (3, count, 7)
            for g in range(3):
                own = {name: value[g] for name, value in extra.items()}
                alone = cosine_topk(queries[g], database[g], 7, **own, backend=backend.name)
                assert same(TopK(found.scores[g], found.indices[g]), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_norms(backend: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    for shape in ((50, 37), (3, 7, 20), (4, 1), (0, 5), (3, 0)):
        database = draw(backend, *shape, dtype=dtype)
        if database.numel():
            database[..., 1, :] = 0
        database.requires_grad_()
        made = {"database": database}
        assert_matches(lambda database: inverse_norms(database, backend=backend.name), reference.inverse_norms, made)
        assert inverse_norms(database, backend=backend.name).shape == shape[:-1]
    wide = draw(backend, 20, 30, dtype=dtype)
    strided = wide.t().contiguous().t()
    norms = inverse_norms(strided, backend=backend.name)
    assert torch.equal(norms, inverse_norms(wide, backend=backend.name))


def test_inverse_norms_at_the_ends_of_float32(backend: Any) -> None:
    database = draw(backend, 4, 8)
    database[0] *= 1e-25
    database[1] *= 1e25
    database[2] = torch.full((8,), 1e-40)  # the inverse overflows: the largest float32
    norms = inverse_norms(database, backend=backend.name)
    expected = reference.inverse_norms(database)
    torch.testing.assert_close(norms[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-6, atol=0)
    assert bool(norms[2].isfinite())


@pytest.mark.parametrize("count", [1, 3, 20])
def test_given_inverse_norms(backend: Any, count: int) -> None:
    count = sized(backend, count)
    made = arguments(backend, (count, 60, 29, 8))
    norms = inverse_norms(made["database"], backend=backend.name)
    assert same(run(backend, made, inverse_norms=norms), run(backend, made))
    # They are used as they are: a weight for each row.
    weights = torch.rand(60).to(backend.device) * 10
    weights[5] = 0
    weights[6] = -3
    found = run(backend, made, inverse_norms=weights)
    lengths = made["database"].double().norm(dim=-1) * weights.double()
    truth = true_scores(made["queries"], made["database"]) * lengths
    assert_exact(found, truth, 8, 29, lengths.abs().expand_as(truth))
    strided = torch.stack([norms, norms], 1)[:, 0]
    assert same(run(backend, made, inverse_norms=strided), run(backend, made))


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "slice":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
        view = wide[..., 1 : 2 * x.shape[-1] : 2]
    elif how == "rows":
        wide = torch.full((2 * x.shape[0], x.shape[1] + 5), NAN, dtype=x.dtype, device=x.device)
        view = wide[::2, 3 : 3 + x.shape[1]]
    elif how == "permuted":
        view = torch.empty_like(x.t().contiguous()).t()
    else:
        view = torch.empty(2 * x.numel() + 1, dtype=x.dtype, device=x.device)[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x)


@pytest.mark.parametrize("how", ["slice", "rows", "permuted", "offset"])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_strides(backend: Any, count: int, how: str) -> None:
    count = sized(backend, count)
    for dtype in backend.dtypes[:2]:
        made = arguments(backend, (count, 60, 29, 8), dtype)
        other = {**made, "queries": strided(made["queries"], how), "database": strided(made["database"], how)}
        assert same(run(backend, other), run(backend, made))


@pytest.mark.parametrize("shape", [(0, 20, 8, 3), (4, 0, 8, 3), (0, 0, 8, 3), (3, 5, 0, 2)], ids=str)
def test_empty(backend: Any, shape: Any) -> None:
    made = arguments(backend, shape)
    for name in ("queries", "database"):
        made[name].requires_grad_()
    found = run(backend, made)
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
    side = cosine_topk(draw(backend, 0, 3, 4), draw(backend, 0, 5, 4), 2, backend=backend.name)
    assert side.scores.shape == (0, 3, 2)


def on(backend: Any) -> Any:
    return lambda **kwargs: cosine_topk(**kwargs, backend=backend.name)


def with_gradients(made: dict[str, Any]) -> dict[str, Any]:
    return {k: v.requires_grad_() if k in ("queries", "database") else v for k, v in made.items()}


@pytest.mark.parametrize("normalized", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("name", ["plain", "odd", "k > N", "one query", "wide", "many queries"])
def test_gradients(backend: Any, name: str, normalized: bool) -> None:
    if backend.slow and name in SLOW:
        pytest.skip("large for the interpreter")
    made = with_gradients(arguments(backend, SHAPES[name]))
    assert_matches(on(backend), reference.cosine_topk, made | {"normalized": normalized})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_other_dtypes(backend: Any, dtype: torch.dtype) -> None:
    """Many queries select one row: its gradients are added in float32 and rounded once."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    made = with_gradients(arguments(backend, (24, 6, 37, 4), dtype))
    assert_matches(on(backend), reference.cosine_topk, made)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_mixed_dtypes(backend: Any, low: torch.dtype) -> None:
    for name in ("queries", "database"):
        made = arguments(backend, SHAPES["odd"])
        made[name] = made[name].to(low)
        assert_matches(on(backend), reference.cosine_topk, with_gradients(made))


def test_gradients_with_filters_and_given_norms(backend: Any) -> None:
    made = with_gradients(arguments(backend, SHAPES["odd"]))
    valid = (torch.rand(3, 67) < 0.05).to(backend.device)
    assert_matches(on(backend), reference.cosine_topk, made | {"valid": valid})
    norms = (torch.rand(67) + 0.5).to(backend.device)
    assert_matches(on(backend), reference.cosine_topk, made | {"inverse_norms": norms})
    strides = {name: strided(made[name].detach(), "slice") for name in ("queries", "database")}
    assert_matches(on(backend), reference.cosine_topk, with_gradients(made | strides))


@pytest.mark.parametrize("wanted", ["queries", "database"])
def test_gradient_of_one_input_alone(backend: Any, wanted: str) -> None:
    made = arguments(backend, SHAPES["odd"])
    made[wanted].requires_grad_()
    assert_matches(on(backend), reference.cosine_topk, made)


def test_no_gradient_from_zero_rows_and_empty_places(backend: Any) -> None:
    made = arguments(backend, (3, 6, 16, 9))
    made["database"][2] = 0
    made["queries"][1] = 0
    made = with_gradients(made)
    found = run(backend, made)
    assert not found.indices.requires_grad
    found.scores[found.indices >= 0].sum().backward()
    assert not made["database"].grad[2].any()
    assert not made["queries"].grad[1].any()
    assert bool(made["database"].grad.isfinite().all())
    made["queries"].grad = made["database"].grad = None
    run(backend, made).scores.sum().backward()  # -inf in the tail
    assert bool(made["database"].grad.isfinite().all())
    assert bool(made["queries"].grad.isfinite().all())


def test_repeats_bit_for_bit(backend: Any) -> None:
    made = with_gradients(arguments(backend, (30, 40, 33, 9) if not backend.slow else (6, 20, 17, 5)))

    def once() -> list[torch.Tensor]:
        found = run(backend, made)
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


def test_arguments_are_not_changed(backend: Any) -> None:
    made = with_gradients(arguments(backend, SHAPES["odd"]))
    copies = {name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)}
    run(backend, made).scores.sum().backward()
    assert all(torch.equal(made[name], copy) for name, copy in copies.items())


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


@pytest.mark.parametrize("count", [2, 20])
def test_no_wrong_neighbour_in_larger_databases(count: int) -> None:
    """What ``benchmarks/systems/search_exactness.py`` does with millions of rows."""
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    from memkern.benchmarks.systems import search_exactness

    for name, dtype, _, wrong, _ in search_exactness.check(30_000, 24, (count,), 10, "cpp"):
        assert wrong == 0, f"{wrong} wrong neighbours in the {name} database, {dtype}"
