"""What a search may find: valid rows, groups, the least score; and the norms it is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memkern.ops import inverse_norms
from memkern.reference import cosine_topk as reference
from memkern.testing.compare import assert_matches
from memkern.testing.topk import assert_exact, same, true_scores

pytestmark = pytest.mark.usefixtures("poison")

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("count", [1, 4, 20])
def test_valid(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 90, 24, 8))
    truth = true_scores(made["queries"], made["database"])
    for keep in (0.5, 0.05, 0.0):
        per_row = (torch.rand(90) < keep).to(backend.device)
        per_pair = (torch.rand(count, 90) < keep).to(backend.device)
        assert_exact(search.run(made, valid=per_row), truth.where(per_row, NAN), 8, 24)
        found = search.run(made, valid=per_pair)
        assert_exact(found, truth.where(per_pair, NAN), 8, 24)
        strided = per_pair.t().contiguous().t()
        assert same(search.run(made, valid=strided), found)


def test_a_filtered_row_reaches_nothing(backend: Any, search: Any) -> None:
    made = search.arguments((3, 30, 16, 5))
    valid = torch.ones(30, dtype=torch.bool, device=backend.device)
    valid[4] = False
    expected = search.run(made, valid=valid)
    made["database"][4] = NAN
    made["database"].requires_grad_()
    found = search.run(made, valid=valid)
    assert same(found, expected)
    found.scores.sum().backward()
    assert bool(made["database"].grad.isfinite().all())
    assert not made["database"].grad[4].any()


@pytest.mark.parametrize("count", [1, 4, 20])
def test_groups(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 80, 24, 6))
    truth = true_scores(made["queries"], made["database"])
    query_group = torch.randint(0, 5, (count,)).to(backend.device)
    row_group = torch.randint(0, 4, (80,)).to(backend.device)
    far = 1 << 40  # ids are compared as int64
    query_group[0], row_group[:3] = far + 1, far
    row_group[3] = far + 1
    same_group = query_group[:, None] == row_group
    groups = {"query_group": query_group, "row_group": row_group}
    assert_exact(search.run(made, **groups), truth.where(same_group, NAN), 6, 24)
    valid = (torch.rand(80) > 0.5).to(backend.device)
    assert_exact(search.run(made, **groups, valid=valid), truth.where(same_group & valid, NAN), 6, 24)


@pytest.mark.parametrize("count", [1, 20])
def test_min_score_keeps_an_equal_score(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 60, 24, 20))
    every = search.run(made)
    bound = float(every.scores[0, 5])
    for limit, kept in ((bound, 6), (math.nextafter(bound, 2.0), 5)):
        found = search.run(made, min_score=limit)
        if limit != bound:
            # A float32 score is compared with the bound as float32 holds it.
            limit = float(torch.tensor(limit))
            kept = 5 if limit > bound else 6
        assert int((found.indices[0] >= 0).sum()) == kept
        keep = every.scores >= limit
        assert torch.equal(found.indices, torch.where(keep, every.indices, -1))
        assert torch.equal(found.scores, torch.where(keep, every.scores, -INF))
    none = search.run(made, min_score=1.5)
    assert bool((none.indices == -1).all())
    inner = search.run(made, normalized=True)
    bound = float(inner.scores[0, 3])
    assert int((search.run(made, normalized=True, min_score=bound).indices[0] >= 0).sum()) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_norms(backend: Any, search: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    for shape in ((50, 37), (3, 7, 20), (4, 1), (0, 5), (3, 0)):
        database = search.draw(*shape, dtype=dtype)
        if database.numel():
            database[..., 1, :] = 0
        database.requires_grad_()
        made = {"database": database}
        assert_matches(lambda database: inverse_norms(database, backend=backend.name), reference.inverse_norms, made)
        assert inverse_norms(database, backend=backend.name).shape == shape[:-1]
    wide = search.draw(20, 30, dtype=dtype)
    strided = wide.t().contiguous().t()
    norms = inverse_norms(strided, backend=backend.name)
    assert torch.equal(norms, inverse_norms(wide, backend=backend.name))


def test_inverse_norms_at_the_ends_of_float32(backend: Any, search: Any) -> None:
    database = search.draw(4, 8)
    database[0] *= 1e-25
    database[1] *= 1e25
    database[2] = torch.full((8,), 1e-40)  # the inverse overflows: the largest float32
    norms = inverse_norms(database, backend=backend.name)
    expected = reference.inverse_norms(database)
    torch.testing.assert_close(norms[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-6, atol=0)
    assert bool(norms[2].isfinite())


@pytest.mark.parametrize("count", [1, 3, 20])
def test_given_inverse_norms(backend: Any, search: Any, count: int) -> None:
    count = search.sized(count)
    made = search.arguments((count, 60, 29, 8))
    norms = inverse_norms(made["database"], backend=backend.name)
    assert same(search.run(made, inverse_norms=norms), search.run(made))
    # They are used as they are: a weight for each row.
    weights = torch.rand(60).to(backend.device) * 10
    weights[5] = 0
    weights[6] = -3
    found = search.run(made, inverse_norms=weights)
    lengths = made["database"].double().norm(dim=-1) * weights.double()
    truth = true_scores(made["queries"], made["database"]) * lengths
    assert_exact(found, truth, 8, 29, lengths.abs().expand_as(truth))
    strided = torch.stack([norms, norms], 1)[:, 0]
    assert same(search.run(made, inverse_norms=strided), search.run(made))
