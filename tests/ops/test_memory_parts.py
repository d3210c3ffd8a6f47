"""The parts of a memory step on every backend: values and gradients, golden numbers, ties, masks, edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import memkern
from memkern import ops
from memkern.benchmarks import golden, registry
from memkern.reference import memory as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

PARTS = (
    "content_weights",
    "sharpen",
    "allocation_weights",
    "update_usage",
    "update_links",
    "directional_weights",
    "read_memory",
    "write_memory",
)
CASES = [
    pytest.param(name, variant, id=f"{name}-{variant}" if variant else name)
    for name in PARTS
    for variant in registry.spec(name).variants
]


def skip_undeclared(backend: Any, op: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip where the backend states that it has no such operator, or not for this dtype."""
    reason = memkern.backends.explain(op, torch.empty(1, dtype=dtype, device=backend.device))[backend.name]
    if reason is not None:
        pytest.skip(f"backend {backend.id}: {reason}")


def on(backend: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


@pytest.mark.parametrize("size", ["tiny", "odd", "heads", "empty"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_values_and_gradients(backend: Any, name: str, variant: str, size: str) -> None:
    skip_undeclared(backend, name)
    spec = registry.spec(name)
    made = spec.case(size, variant=variant, device=backend.device).arguments()
    assert_matches(on(backend, spec.public), spec.reference, made)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_dtypes(backend: Any, name: str, variant: str, dtype: str) -> None:
    skip_undeclared(backend, name, registry.DTYPES[dtype])
    spec = registry.spec(name)
    made = spec.case("odd", variant=variant, dtype=dtype, device=backend.device).arguments()
    assert_matches(on(backend, spec.public), spec.reference, made)


@pytest.mark.parametrize("name", PARTS)
def test_golden_numbers(backend: Any, name: str) -> None:
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    skip_undeclared(backend, name, dtype)
    cases = list(golden.golden_cases(name))
    assert cases
    for case in cases:
        for comparison in golden.check_golden(case, on(backend, getattr(ops, name)), dtype, backend.device):
            assert comparison.passed, (case["arguments"], comparison)


@pytest.mark.parametrize("name", PARTS)
def test_any_strides(backend: Any, name: str) -> None:
    skip_undeclared(backend, name)
    spec = registry.spec(name)
    made = spec.case("tiny", device=backend.device).arguments()
    for key, value in made.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            turned = value.detach().transpose(0, -1).contiguous().transpose(0, -1)
            made[key] = turned.requires_grad_(value.requires_grad)
    assert_matches(on(backend, spec.public), spec.reference, made)


@pytest.mark.parametrize("slots", [1, 15, 16, 17, 40])
def test_allocation_breaks_ties_by_the_lowest_slot(backend: Any, slots: int) -> None:
    skip_undeclared(backend, "allocation_weights")
    generator = torch.Generator().manual_seed(slots)
    usage = (torch.randint(0, 4, (3, slots), generator=generator) / 4).to(backend.device).requires_grad_()
    assert_matches(on(backend, ops.allocation_weights), reference.allocation_weights, {"usage": usage})
    weights = ops.allocation_weights(usage, backend=backend.name)
    lowest = (usage == usage.amin(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(weights.argmax(-1)[usage.amin(-1) < 1], lowest[usage.amin(-1) < 1])
    assert bool((weights.sum(-1) <= 1 + 1e-6).all())


@pytest.mark.parametrize("slots", [1024, 1025, 1500])
def test_allocation_of_many_slots(backend: Any, slots: int) -> None:
    """Past 1024 slots the order is sorted, not counted; products underflow long before."""
    skip_undeclared(backend, "allocation_weights")
    if backend.slow:
        pytest.skip("slow under the interpreter")
    usage = (0.99 + 0.01 * torch.rand(2, slots)).to(backend.device)
    usage[:, ::3] = 0.995
    made = {"usage": usage.requires_grad_()}
    assert_matches(on(backend, ops.allocation_weights), reference.allocation_weights, made)


def test_content_of_zeros_is_uniform_with_a_finite_gradient(backend: Any) -> None:
    skip_undeclared(backend, "content_weights")
    memory = torch.zeros(1, 5, 3, device=backend.device, requires_grad=True)
    keys = torch.zeros(1, 2, 3, device=backend.device, requires_grad=True)
    strengths = torch.full((1, 2), 3.0, device=backend.device)
    weights = ops.content_weights(memory, keys, strengths, backend=backend.name)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))
    (weights * torch.arange(5.0, device=backend.device)).sum().backward()
    assert bool(memory.grad.isfinite().all())
    assert bool(keys.grad.isfinite().all())


def test_masked_slots_reach_nothing(backend: Any) -> None:
    skip_undeclared(backend, "content_weights")
    memory = torch.randn(2, 5, 3, device=backend.device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=backend.device)
    mask[0, 1] = mask[1] = False
    memory[~mask] = float("nan")
    memory.requires_grad_()
    keys = torch.randn(2, 2, 3, device=backend.device, requires_grad=True)
    strengths = torch.ones(2, 2, device=backend.device, requires_grad=True)
    weights = ops.content_weights(memory, keys, strengths, slot_mask=mask, backend=backend.name)
    assert not weights[1].any()
    assert not weights[0, :, 1].any()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, device=backend.device))
    (weights * torch.randn_like(weights)).sum().backward()
    assert not memory.grad[~mask].any()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in (memory, keys, strengths))
    assert not keys.grad[1].any()


def test_sharpen_at_the_edges(backend: Any) -> None:
    skip_undeclared(backend, "sharpen")
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.1], [1.0, 0.0, 0.0]], device=backend.device)
    weights.requires_grad_()
    for gamma in (0.3, 1.0, 2.0, 500.0):
        sharp = ops.sharpen(weights, gamma, backend=backend.name)
        assert not sharp[0].any()
        torch.testing.assert_close(sharp[1:].sum(-1), torch.ones(2, device=backend.device))
        (grad,) = torch.autograd.grad((sharp * torch.arange(3.0, device=backend.device)).sum(), weights)
        assert bool(grad.isfinite().all())
        assert not grad[weights == 0].any()
    torch.testing.assert_close(ops.sharpen(weights, 500.0, backend=backend.name)[1].argmax().item(), 1)


def test_sharpen_takes_any_rank_and_a_broadcast_exponent(backend: Any) -> None:
    skip_undeclared(backend, "sharpen")
    weights = torch.rand(2, 3, 5, device=backend.device, requires_grad=True)
    for size in ((), (3,), (2, 1), (2, 3)):
        gamma = (0.5 + torch.rand(size, device=backend.device)).requires_grad_()
        made = {"weights": weights, "gamma": gamma}
        expected = lambda weights, gamma: reference.sharpen(weights, gamma.expand(2, 3))  # noqa: E731
        assert_matches(on(backend, ops.sharpen), expected, made)
    flat = weights.detach()[0, 0]
    torch.testing.assert_close(
        ops.sharpen(flat, 2.0, backend=backend.name), flat**2 / (flat**2).sum(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["no batch", "no slot"])
@pytest.mark.parametrize("name", ["sharpen", "allocation_weights"])
def test_nothing_to_weigh_gives_zero_gradients(backend: Any, name: str, sizes: tuple[int, int]) -> None:
    skip_undeclared(backend, name)
    weights = torch.empty(sizes, device=backend.device, requires_grad=True)
    rest = (torch.empty(sizes[0], device=backend.device, requires_grad=True),) if name == "sharpen" else ()
    result = getattr(ops, name)(weights, *rest, backend=backend.name)
    assert result.shape == sizes
    for leaf, grad in zip((weights, *rest), torch.autograd.grad(result.sum(), (weights, *rest)), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_factors_below_zero_are_zero(backend: Any) -> None:
    """Write weights that rounding pushes past a sum of one must not make links or precedence negative."""
    skip_undeclared(backend, "update_links")
    links = torch.zeros(1, 1, 3, 3, device=backend.device)
    links[0, 0, 0, 1] = 0.5
    precedence = torch.tensor([[[0.2, 0.3, 0.5]]], device=backend.device)
    write = torch.tensor([[[0.75, 0.75, 0.0]]], device=backend.device, requires_grad=True)
    updated, followed = ops.update_links(links, precedence, write, backend=backend.name)
    assert updated[0, 0, 0, 1].item() == pytest.approx(0.75 * 0.3)
    assert torch.equal(followed, write.detach())
    assert not updated.diagonal(dim1=-2, dim2=-1).any()


def test_usage_stays_in_its_range(backend: Any) -> None:
    skip_undeclared(backend, "update_usage")
    one = torch.ones(1, 2, 4, device=backend.device)
    usage = ops.update_usage(one[:, 0], one, 0 * one, one[..., 0], backend=backend.name)
    assert torch.equal(usage, one[:, 0])
    freed = ops.update_usage(one[:, 0], one, one, one[..., 0], backend=backend.name)
    assert not freed.any()


def test_nan_is_not_hidden(backend: Any) -> None:
    memory = torch.randn(2, 5, 3, device=backend.device)
    memory[0, 2, 1] = float("nan")
    keys, strengths = torch.randn(2, 1, 3, device=backend.device), torch.ones(2, 1, device=backend.device)
    if memkern.backends.explain("content_weights", memory)[backend.name] is None:
        weights = ops.content_weights(memory, keys, strengths, backend=backend.name)
        assert bool(weights[0].isnan().all())
        assert bool(weights[1].isfinite().all())
    if memkern.backends.explain("sharpen", memory)[backend.name] is None:
        assert bool(ops.sharpen(memory[:, :, 1].abs(), 2.0, backend=backend.name)[0].isnan().all())
