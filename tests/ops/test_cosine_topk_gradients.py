"""Gradients of the scores on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memkern.reference import cosine_topk as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

# (Q, N, D, k) and why it is here.
SHAPES = {
    "plain": (5, 60, 32, 7),
    "odd": (3, 67, 37, 5),  # tails in every axis
    "k > N": (3, 4, 16, 9),
    "one query": (1, 133, 48, 3),
    "wide": (2, 30, 777, 4),
    "many queries": (70, 90, 24, 6),
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("normalized", [False, True], ids=["cosine", "inner product"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(backend: Any, search: Any, name: str, normalized: bool) -> None:
    if backend.slow and name == "many queries":
        pytest.skip("large for the interpreter")
    made = search.arguments(SHAPES[name], grad=True)
    assert_matches(search.operator, reference.cosine_topk, made | {"normalized": normalized})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_other_dtypes(backend: Any, search: Any, dtype: torch.dtype) -> None:
    """Many queries select one row: its gradients are added in float32 and rounded once."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    made = search.arguments((24, 6, 37, 4), dtype, grad=True)
    assert_matches(search.operator, reference.cosine_topk, made)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_mixed_dtypes(backend: Any, search: Any, low: torch.dtype) -> None:
    for name in ("queries", "database"):
        made = search.arguments(SHAPES["odd"], grad=True)
        made[name] = made[name].detach().to(low).requires_grad_()
        assert_matches(search.operator, reference.cosine_topk, made)


def test_gradients_with_filters_and_given_norms(backend: Any, search: Any, strided: Any) -> None:
    made = search.arguments(SHAPES["odd"], grad=True)
    valid = (torch.rand(3, 67) < 0.05).to(backend.device)
    assert_matches(search.operator, reference.cosine_topk, made | {"valid": valid})
    norms = (torch.rand(67) + 0.5).to(backend.device)
    assert_matches(search.operator, reference.cosine_topk, made | {"inverse_norms": norms})
    strides = {name: strided(made[name].detach(), "slice").requires_grad_() for name in ("queries", "database")}
    assert_matches(search.operator, reference.cosine_topk, made | strides)


@pytest.mark.parametrize("wanted", ["queries", "database"])
def test_gradient_of_one_input_alone(backend: Any, search: Any, wanted: str) -> None:
    made = search.arguments(SHAPES["odd"])
    made[wanted].requires_grad_()
    assert_matches(search.operator, reference.cosine_topk, made)


def test_no_gradient_from_zero_rows_and_empty_places(backend: Any, search: Any) -> None:
    made = search.arguments((3, 6, 16, 9))
    made["database"][2] = 0
    made["queries"][1] = 0
    made["queries"][2, 3] = torch.nan  # finds nothing
    for name in ("queries", "database"):
        made[name].requires_grad_()
    found = search.run(made)
    assert not found.indices.requires_grad
    found.scores[found.indices >= 0].sum().backward()
    assert not made["database"].grad[2].any()
    assert not made["queries"].grad[1:].any()
    assert bool(made["database"].grad.isfinite().all())
    made["queries"].grad = made["database"].grad = None
    search.run(made).scores.sum().backward()  # -inf in the tail
    assert bool(made["database"].grad.isfinite().all())
    assert bool(made["queries"].grad.isfinite().all())
