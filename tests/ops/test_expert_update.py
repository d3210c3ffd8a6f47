"""Expert updates on every backend, against the float64 reference: values, every gradient, edges, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import aggregate_experts, update_experts
from memkern.reference import expert_update as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison", "declared")

# (B, K, S, D) and why it is here.
SHAPES = {
    "plain": (2, 4, 4, 32),
    "one row": (1, 3, 1, 16),
    "odd": (3, 3, 5, 37),  # tails in every axis, rows of a weight that no wide load can take
    "one expert": (2, 1, 3, 24),
    "narrow": (2, 2, 3, 1),
    "wide": (2, 2, 3, 144),  # more columns than one block
    "rows": (5, 2, 17, 16),  # more rows than one block
    "experts": (1, 9, 2, 8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOATS = ("states", "hiddens", "probs", "gate_weight", "gate_bias", "update_weight", "update_bias")


@pytest.fixture
def declared(request: pytest.FixtureRequest) -> None:
    """Skips on a backend that has no implementation of this column."""
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend").name
        reason = memkern.backends.explain("update_experts")[name] or ""
        if "has no" in reason:
            pytest.skip(reason)


def arguments(
    backend: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    requires_grad: bool = True,
    **extra: Any,
) -> dict[str, Any]:
    rows, experts, slots, width = shape
    generator = torch.Generator().manual_seed(rows * 1000 + slots * 100 + width + experts)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(size, generator=generator) * scale
        return value.to(backend.device, dtype).requires_grad_(requires_grad)

    scale = 1 / math.sqrt(max(width, 1))
    probs = torch.rand(rows, experts, generator=generator).to(backend.device, dtype).requires_grad_(requires_grad)
    made = {
        "states": draw(rows, experts, slots, width),
        "hiddens": draw(rows, slots, width),
        "probs": probs,
        "gate_weight": draw(experts, width, 2 * width, scale=scale),
        "gate_bias": draw(experts, width, scale=0.3) if bias else None,
        "update_weight": draw(experts, width, 2 * width, scale=scale),
        "update_bias": draw(experts, width, scale=0.3) if bias else None,
    }
    return made | extra


def on(backend: Any, function: Any = update_experts) -> Any:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


def matches(backend: Any, made: dict[str, Any]) -> None:
    assert_matches(on(backend), reference.update_experts, made)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend: Any, shape: Any) -> None:
    matches(backend, arguments(backend, shape))


@pytest.mark.parametrize("save", ["activations", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_with_mask(backend: Any, dtype: torch.dtype, save: str) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    mask = torch.tensor([True, False, True], device=backend.device)
    matches(backend, arguments(backend, SHAPES["odd"], dtype, row_mask=mask, save=save))
    if not backend.slow or dtype == torch.bfloat16:
        matches(backend, arguments(backend, SHAPES["wide"], dtype, bias=False, save=save))


def test_one_bias(backend: Any) -> None:
    for missing in ("gate_bias", "update_bias"):
        matches(backend, arguments(backend, SHAPES["odd"]) | {missing: None})


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", [("states",), ("hiddens", "probs"), ("gate_weight", "update_weight"), FLOATS[1:]])
def test_mixed_dtypes(backend: Any, low: torch.dtype, which: tuple[str, ...]) -> None:
    made = arguments(backend, SHAPES["odd"])
    for name in which:
        made[name] = made[name].detach().to(low).requires_grad_()
    out = update_experts(**made, backend=backend.name)
    assert out.dtype == made["states"].dtype
    matches(backend, made)


@pytest.mark.parametrize("wanted", FLOATS)
def test_one_gradient_at_a_time(backend: Any, wanted: str) -> None:
    made = arguments(backend, SHAPES["odd"], requires_grad=False)
    made[wanted].requires_grad_()
    matches(backend, made)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "slice":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
        view = wide[..., 1 : 2 * x.shape[-1] : 2]
    elif how == "permuted":
        view = torch.empty_like(x.transpose(0, -1).contiguous()).transpose(0, -1)
    else:
        view = torch.empty(2 * x.numel() + 1, dtype=x.dtype, device=x.device)[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["slice", "permuted", "offset"])
def test_any_strides(backend: Any, how: str, dtype: torch.dtype) -> None:
    made = arguments(backend, SHAPES["plain"], dtype)
    for name in FLOATS:
        made[name] = strided(made[name], how)
    mask = torch.tensor([[True, False], [False, False]], device=backend.device)[:, 0]
    matches(backend, made | {"row_mask": mask})


def test_expanded_inputs(backend: Any) -> None:
    made = arguments(backend, SHAPES["plain"], requires_grad=False)
    made["states"] = made["states"][:1].expand(2, -1, -1, -1)
    made["gate_weight"] = made["gate_weight"][:1].expand(4, -1, -1)
    made["hiddens"] = made["hiddens"][:, :1].expand(-1, 4, -1)
    matches(backend, made)


def test_a_gradient_without_strides(backend: Any) -> None:
    """The gradient of a sum comes expanded from one number."""
    made = arguments(backend, SHAPES["odd"])
    leaves = [made[name] for name in FLOATS]
    actual = torch.autograd.grad(update_experts(**made, backend=backend.name).sum(), leaves)
    expected = torch.autograd.grad(reference.update_experts(**made).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8), (2, 2, 3, 0)], ids=str)
def test_empty(backend: Any, shape: Any) -> None:
    for save in ("activations", "none"):
        made = arguments(backend, shape, save=save)
        out = update_experts(**made, backend=backend.name)
        assert out.shape == shape
        out.sum().backward()
        for name in FLOATS:
            assert made[name].grad.shape == made[name].shape
            assert not made[name].grad.any()
    states = made["states"].detach().requires_grad_()
    probs = made["probs"].detach().requires_grad_()
    read = aggregate_experts(states, probs, backend=backend.name)
    assert read.shape == (shape[0], shape[2], shape[3])
    assert not read.any()
    read.sum().backward()
    assert not states.grad.any()
    assert not probs.grad.any()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_probability_of_zero_keeps_the_state_bit_for_bit(backend: Any, dtype: torch.dtype) -> None:
    made = arguments(backend, SHAPES["odd"], dtype)
    with torch.no_grad():
        made["probs"][:, 1] = 0
        made["probs"][2, 0] = -0.0
        made["states"][0, 1, 0, :4] = torch.tensor([-0.0, 1e-42, float("inf"), 3.0])
        made["states"][0, 1, 0, 2] = 1.0 if dtype == torch.bfloat16 else made["states"][0, 1, 0, 2]
    out = update_experts(**made, backend=backend.name)
    assert torch.equal(bits(out[:, 1]), bits(made["states"][:, 1]))
    assert torch.equal(bits(out[2, 0]), bits(made["states"][2, 0]))
    assert not torch.equal(out[0, 0], made["states"][0, 0])
    with torch.no_grad():
        made["states"][0, 1, 0, 2] = 2.0
    # Its probability still has a gradient.
    matches(backend, made)
    with torch.no_grad():
        made["hiddens"][1, 2, 3] = float("nan")
    out = update_experts(**made, backend=backend.name)
    assert torch.equal(bits(out[1, 1]), bits(made["states"][1, 1]))
    assert bool(out[1, 0, 2].isnan().all())
    assert bool(out[1, 0, 1].isfinite().all())


@pytest.mark.parametrize("save", ["activations", "none"])
def test_masked_rows_keep_their_state_and_reach_nothing(backend: Any, save: str) -> None:
    made = arguments(backend, SHAPES["odd"], save=save)
    kept = torch.tensor([True, False, True], device=backend.device)
    with torch.no_grad():
        made["hiddens"][1, 0] = float("nan")
        made["states"][1, 1, 2, 3] = float("nan")
        made["states"][1, 2, 2, 3] = -0.0
        made["probs"][1] = float("nan")
    out = update_experts(**made, row_mask=kept, backend=backend.name)
    assert torch.equal(bits(out[1]), bits(made["states"][1]))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(backend.device)
    grads = torch.autograd.grad(out, [made[name] for name in FLOATS], cotangent)
    d_states, d_hiddens, d_probs, *_ = grads
    assert torch.equal(d_states[1], cotangent[1])
    assert not d_hiddens[1].any()
    assert not d_probs[1].any()
    assert all(bool(grad.isfinite().all()) for grad in grads)
    rows = [0, 2]
    alone = {**made} | {name: made[name].detach()[rows].requires_grad_() for name in FLOATS[:3]}
    expected = torch.autograd.grad(
        update_experts(**alone, backend=backend.name), [alone[name] for name in FLOATS], cotangent[rows]
    )
    for actual, want in zip(grads[3:], expected[3:], strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)
    made["row_mask"] = torch.zeros(3, dtype=torch.bool, device=backend.device)
    assert torch.equal(bits(update_experts(**made, backend=backend.name)), bits(made["states"]))


def test_nan_propagates_within_its_row(backend: Any) -> None:
    made = arguments(backend, SHAPES["plain"], requires_grad=False)
    made["states"][0, 1, 2, 3] = float("nan")
    out = update_experts(**made, backend=backend.name)
    assert bool(out[0, 1, 2].isnan().all())
    assert int(out.isnan().sum()) == 32


def test_saturated_gates_are_exact_and_finite(backend: Any) -> None:
    """Pre-activations of hundreds: gates of 0 and 1, updates of -1 and 1, and gradients of zero, not NaN."""
    made = arguments(backend, (1, 2, 2, 8))
    with torch.no_grad():
        made["gate_bias"][0] = 300.0
        made["gate_bias"][1] = -300.0
        made["update_bias"][:] = torch.tensor([300.0, -300.0])[:, None].to(backend.device)
        made["probs"].fill_(1.0)
    out = update_experts(**made, backend=backend.name)
    assert torch.equal(out[:, 0], torch.ones_like(out[:, 0]))
    torch.testing.assert_close(out[:, 1], made["states"][:, 1].detach())
    grads = torch.autograd.grad(out.sum(), [made[name] for name in FLOATS])
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[3].any()


def test_by_hand(backend: Any) -> None:
    """g = 0.8, p = 0.25, u = -0.5, M = 1 -> 0.2 * -0.5 + 0.8 = 0.7."""
    one = torch.ones(1, 1, 1, 1, device=backend.device)
    zero = torch.zeros(1, 1, 2, device=backend.device)
    gate_bias, update_bias = math.log(0.8 / 0.2) * one[0, 0], math.atanh(-0.5) * one[0, 0]
    out = update_experts(one, one[0], 0.25 * one[0, 0], zero, gate_bias, zero, update_bias, backend=backend.name)
    assert out.item() == pytest.approx(0.7, abs=1e-6)
    # The first half of a weight's columns acts on the state, the second on the hidden.
    gate = torch.tensor([[[2.0, 0.0]]], device=backend.device)
    update = torch.tensor([[[0.0, 3.0]]], device=backend.device)
    out = update_experts(0.5 * one, 0.25 * one[0], one[0, 0], gate, None, update, None, backend=backend.name)
    g, u = 1 / (1 + math.exp(-1.0)), math.tanh(0.75)
    assert out.item() == pytest.approx(g * u + (1 - g) * 0.5, rel=1e-5)


def test_save_changes_no_bit(backend: Any) -> None:
    made = arguments(backend, SHAPES["odd"])

    def run(save: str) -> list[torch.Tensor]:
        out = update_experts(**made, save=save, backend=backend.name)
        return [out, *torch.autograd.grad(out.square().sum(), [made[name] for name in FLOATS])]

    for a, b in zip(run("activations"), run("none"), strict=True):
        assert torch.equal(a, b)


def test_repeats_bit_for_bit(backend: Any) -> None:
    made = arguments(backend, SHAPES["rows"] if backend.slow else (9, 3, 20, 65))

    def run() -> list[torch.Tensor]:
        out = update_experts(**made, backend=backend.name)
        return [out, *torch.autograd.grad(out.square().sum(), [made[name] for name in FLOATS])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_arguments_are_not_changed(backend: Any) -> None:
    made = arguments(backend, SHAPES["odd"])
    copies = {name: value.clone() for name, value in made.items()}
    out = update_experts(**made, backend=backend.name)
    held = out.detach().clone()
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert all(torch.equal(made[name], copy) for name, copy in copies.items())
    # A second call must not write over the first one's result, nor over what its backward still reads.
    update_experts(**arguments(backend, SHAPES["odd"], bias=False), backend=backend.name)
    assert torch.equal(out, held)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_aggregate(backend: Any, shape: Any) -> None:
    made = arguments(backend, shape)
    made = {"states": made["states"], "probs": made["probs"]}
    assert_matches(on(backend, aggregate_experts), reference.aggregate_experts, made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aggregate_dtypes_and_strides(backend: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    whole = arguments(backend, SHAPES["odd"], dtype)
    made = {"states": whole["states"], "probs": whole["probs"]}
    assert_matches(on(backend, aggregate_experts), reference.aggregate_experts, made)
    for how in ("slice", "permuted", "offset"):
        moved = {name: strided(value, how) for name, value in made.items()}
        assert_matches(on(backend, aggregate_experts), reference.aggregate_experts, moved)
    if dtype != torch.float64:
        made["probs"] = made["probs"].detach().float().requires_grad_()
        assert_matches(on(backend, aggregate_experts), reference.aggregate_experts, made)


@pytest.mark.parametrize("wanted", ["states", "probs"])
def test_aggregate_one_gradient(backend: Any, wanted: str) -> None:
    whole = arguments(backend, SHAPES["plain"], requires_grad=False)
    made = {"states": whole["states"], "probs": whole["probs"]}
    made[wanted].requires_grad_()
    assert_matches(on(backend, aggregate_experts), reference.aggregate_experts, made)
