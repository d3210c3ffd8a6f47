"""Slots of a token sequence on every backend: means by id, replaced rows, absent and repeated ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkern
from memkern.ops import gather_slots, scatter_slots
from memkern.reference import expert_update as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison", "declared")

# (B, T, S, D)
SHAPES = {
    "plain": (2, 12, 4, 32),
    "odd": (3, 19, 5, 37),
    "one": (1, 1, 1, 1),
    "more slots than tokens": (2, 3, 70, 8),
    "long": (1, 300, 3, 24),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def declared(request: pytest.FixtureRequest) -> None:
    """Skips on a backend that has no implementation of these operators."""
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend").name
        reason = memkern.backends.explain("gather_slots")[name] or ""
        if "has no" in reason:
            pytest.skip(reason)


def arguments(backend: Any, shape: Any, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """For gather and for scatter: ids repeat in the sequence, one slot id is absent, one occurs twice."""
    rows, tokens, slots, width = shape
    base = 2**40  # an id that int32 cannot hold
    slot_ids = torch.arange(slots) + base
    if slots > 2:
        slot_ids[-1] = slot_ids[0]
        slot_ids[1] = -5
    input_ids = torch.randint(0, slots + 2, (rows, tokens)) + base
    made = {
        "input_ids": input_ids.to(backend.device),
        "slot_ids": slot_ids.to(backend.device),
    }
    sequence, values = torch.randn(rows, tokens, width), torch.randn(rows, slots, width)
    sequence, values = (x.to(backend.device, dtype).requires_grad_() for x in (sequence, values))
    return {"hiddens": sequence} | made, {"sequence": sequence, "slots": values} | made


def on(backend: Any, function: Any) -> Any:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


def both_match(backend: Any, gather: dict[str, Any], scatter: dict[str, Any]) -> None:
    assert_matches(on(backend, gather_slots), reference.gather_slots, gather)
    assert_matches(on(backend, scatter_slots), reference.scatter_slots, scatter)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend: Any, shape: Any) -> None:
    both_match(backend, *arguments(backend, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    both_match(backend, *arguments(backend, SHAPES["odd"], dtype))
    both_match(backend, *arguments(backend, SHAPES["long"], dtype))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(backend: Any, low: torch.dtype) -> None:
    for name in ("sequence", "slots"):
        _, made = arguments(backend, SHAPES["odd"])
        made[name] = made[name].detach().to(low).requires_grad_()
        out = scatter_slots(**made, backend=backend.name)
        assert out.dtype == made["sequence"].dtype
        assert_matches(on(backend, scatter_slots), reference.scatter_slots, made)


def test_any_strides(backend: Any) -> None:
    gather, scatter = arguments(backend, SHAPES["odd"])

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(x.is_floating_point())

    for made in (gather, scatter):
        for name, value in made.items():
            made[name] = moved(value) if value.dim() > 1 else torch.stack([value, value], 1)[:, 0]
    both_match(backend, gather, scatter)
    gather["hiddens"] = gather["hiddens"].detach()[:, :1].expand(-1, 19, -1)
    scatter["slots"] = scatter["slots"].detach()[:, :1].expand(-1, 5, -1)
    both_match(backend, gather, scatter)


def test_a_gradient_without_strides(backend: Any) -> None:
    gather, scatter = arguments(backend, SHAPES["odd"])
    gather_slots(**gather, backend=backend.name).sum().backward()
    scatter_slots(**scatter, backend=backend.name).sum().backward()
    expected = torch.autograd.grad(reference.scatter_slots(**scatter).sum(), scatter["slots"])[0]
    torch.testing.assert_close(scatter["slots"].grad, expected)


def test_gather_by_hand(backend: Any) -> None:
    hiddens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]], device=backend.device)
    ids = torch.tensor([[7, 9, 7]], device=backend.device)
    out = gather_slots(hiddens, ids, torch.tensor([7, 8, 9, 7], device=backend.device), backend=backend.name)
    assert out.tolist() == [[[3.0, 4.5], [0.0, 0.0], [3.0, 4.0], [3.0, 4.5]]]


def test_scatter_by_hand(backend: Any) -> None:
    sequence = torch.zeros(1, 4, 1, device=backend.device, requires_grad=True)
    slots = torch.tensor([[[1.0], [2.0], [3.0]]], device=backend.device, requires_grad=True)
    ids = torch.tensor([[7, 5, 9, 7]], device=backend.device)
    out = scatter_slots(sequence, slots, ids, torch.tensor([7, 9, 7], device=backend.device), backend=backend.name)
    assert out.flatten().tolist() == [1.0, 0.0, 2.0, 1.0]
    (out.flatten() * torch.tensor([1.0, 10.0, 100.0, 1000.0], device=backend.device)).sum().backward()
    assert sequence.grad.flatten().tolist() == [0.0, 10.0, 0.0, 0.0]
    assert slots.grad.flatten().tolist() == [1001.0, 100.0, 0.0]


def test_nan_stays_with_its_id(backend: Any) -> None:
    gather, scatter = arguments(backend, SHAPES["plain"])
    ids = gather["slot_ids"][torch.arange(12) % 4].repeat(2, 1)
    ids[:, 11] = 3
    with torch.no_grad():
        gather["hiddens"][0, 2, 5] = float("nan")  # slot 2
        gather["hiddens"][1, 11] = float("nan")  # no slot
    out = gather_slots(gather["hiddens"], ids, gather["slot_ids"], backend=backend.name)
    assert bool(out[0, 2].isnan().any())
    assert int(out.isnan().sum()) == 1
    spliced = scatter_slots(gather["hiddens"], scatter["slots"], ids, gather["slot_ids"], backend=backend.name)
    assert bool(spliced[0].isfinite().all())
    assert bool(spliced[1, 11].isnan().all())
    spliced[0].sum().backward()
    assert not gather["hiddens"].grad[0, :11].any()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)], ids=str)
def test_empty(backend: Any, shape: Any) -> None:
    gather, scatter = arguments(backend, shape)
    out = gather_slots(**gather, backend=backend.name)
    assert out.shape == (shape[0], shape[2], shape[3])
    if shape[1] == 0:
        assert not out.any()
    out.sum().backward()
    assert gather["hiddens"].grad.shape == gather["hiddens"].shape
    out = scatter_slots(**scatter, backend=backend.name)
    assert out.shape == scatter["sequence"].shape
    assert out.data_ptr() != scatter["sequence"].data_ptr() or out.numel() == 0
    out.sum().backward()
    assert scatter["slots"].grad.shape == scatter["slots"].shape
    if shape[1] == 0:
        assert not scatter["slots"].grad.any()


def test_repeats_bit_for_bit_and_changes_no_argument(backend: Any) -> None:
    gather, scatter = arguments(backend, SHAPES["long"])
    copies = {name: value.clone() for name, value in scatter.items()}

    def run() -> list[torch.Tensor]:
        means = gather_slots(**gather, backend=backend.name)
        spliced = scatter_slots(**scatter, backend=backend.name)
        total = means.square().sum() + spliced.square().sum()
        return [means, spliced, *torch.autograd.grad(total, [scatter["sequence"], scatter["slots"]])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert all(torch.equal(scatter[name], copy) for name, copy in copies.items())
