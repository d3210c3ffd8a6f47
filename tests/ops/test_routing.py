"""Routing on every backend, against the float64 reference: values, every gradient, edges, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import load_balance_loss, route_experts, routing_entropy, temperature_softmax
from memkern.reference import routing as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

# (B, S, D, K) and why it is here.
SHAPES = {
    "plain": (4, 8, 32, 4),
    "one row": (1, 5, 16, 2),
    "one slot": (7, 1, 24, 5),  # token routing: the row is its own pool
    "odd": (3, 7, 37, 3),  # tails in every axis
    "one expert": (5, 4, 16, 1),
    "wide": (3, 3, 600, 6),  # more columns than one block
    "many experts": (5, 2, 33, 67),
    "most experts": (3, 1, 40, 256),
    "narrow": (6, 3, 1, 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def arguments(
    backend: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    pooling: str = "mean",
    masks: bool = False,
    bias: bool = True,
    temperature: Any = 0.7,
    requires_grad: bool = True,
    **extra: Any,
) -> dict[str, Any]:
    rows, slots, width, experts = shape
    generator = torch.Generator().manual_seed(rows * 1000 + slots * 100 + width + experts)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(size, generator=generator) * scale
        return value.to(backend.device, dtype).requires_grad_(requires_grad)

    made: dict[str, Any] = {
        "hiddens": draw(rows, slots, width),
        "weight": draw(experts, width, scale=2 / math.sqrt(width)),
        "bias": draw(experts, scale=0.3) if bias else None,
        "temperature": temperature,
        "pooling": pooling,
        "pool_query": draw(width) if pooling == "attention" else None,
    }
    if masks:
        slot_mask = torch.rand(rows, slots, generator=generator) > 0.4
        slot_mask[0] = False
        made["slot_mask"] = slot_mask.to(backend.device)
        made["row_mask"] = (torch.rand(rows, generator=generator) > 0.4).to(backend.device)
    return made | extra


def on(backend: Any, function: Any = route_experts) -> Any:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend: Any, shape: Any, pooling: str) -> None:
    assert_matches(on(backend), reference.route_experts, arguments(backend, shape, pooling=pooling))


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_with_masks(backend: Any, dtype: torch.dtype, pooling: str) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    made = arguments(backend, SHAPES["odd"], dtype, pooling=pooling, masks=True)
    assert_matches(on(backend), reference.route_experts, made)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(backend: Any, low: torch.dtype) -> None:
    made = arguments(backend, SHAPES["odd"], pooling="attention")
    made["hiddens"] = made["hiddens"].detach().to(low).requires_grad_()
    assert_matches(on(backend), reference.route_experts, made)
    made = arguments(backend, SHAPES["odd"])
    made["weight"] = made["weight"].detach().to(low).requires_grad_()
    assert_matches(on(backend), reference.route_experts, made)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_clamp(backend: Any, clamp: float | None, straight_through: bool) -> None:
    made = arguments(backend, SHAPES["plain"], clamp=clamp, straight_through=straight_through, bias=False)
    assert_matches(on(backend), reference.route_experts, made)


def test_temperature_tensor_gets_a_gradient(backend: Any) -> None:
    temperature = torch.tensor(0.6, device=backend.device, requires_grad=True)
    made = arguments(backend, SHAPES["odd"], temperature=temperature, masks=True)
    assert_matches(on(backend), reference.route_experts, made)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 100.0])
def test_extreme_temperatures_stay_finite(backend: Any, temperature: float) -> None:
    made = arguments(backend, SHAPES["plain"], temperature=temperature)
    result = route_experts(**made, backend=backend.name)
    assert all(bool(field.isfinite().all()) for field in result)
    sum(field.sum() for field in result).backward()
    assert bool(made["hiddens"].grad.isfinite().all())
    assert_matches(on(backend), reference.route_experts, made)


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


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("how", ["slice", "permuted", "offset"])
def test_any_strides(backend: Any, how: str, pooling: str) -> None:
    made = arguments(backend, SHAPES["odd"], pooling=pooling, masks=True)
    for name in ("hiddens", "weight", "pool_query"):
        if made[name] is not None:
            made[name] = strided(made[name], how)
    made["slot_mask"] = made["slot_mask"].t().contiguous().t()
    assert_matches(on(backend), reference.route_experts, made)


def test_expanded_input(backend: Any) -> None:
    made = arguments(backend, SHAPES["plain"], requires_grad=False)
    made["hiddens"] = made["hiddens"][:1].expand(4, -1, -1)
    assert_matches(on(backend), reference.route_experts, made)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("shape", [(0, 4, 8, 3), (3, 0, 8, 3), (0, 0, 8, 2)], ids=str)
def test_empty(backend: Any, shape: Any, pooling: str) -> None:
    made = arguments(backend, shape, pooling=pooling)
    result = route_experts(**made, backend=backend.name)
    assert result.probs.shape == result.logits.shape == (shape[0], shape[3])
    assert result.entropy.shape == (shape[0],)
    if shape[0] == 0:
        assert result.load_balance_loss.item() == 0.0
    else:
        torch.testing.assert_close(result.probs, torch.full_like(result.probs, 1 / shape[3]), rtol=0, atol=0)
    sum(field.sum() for field in result).backward()
    for name in ("hiddens", "weight", "pool_query"):
        if made[name] is not None:
            assert made[name].grad.shape == made[name].shape
            assert not made[name].grad.any()


def test_zero_rows_are_uniform_and_send_no_gradient(backend: Any) -> None:
    made = arguments(backend, (5, 2, 16, 4))
    with torch.no_grad():
        made["hiddens"][1] = 0
        made["hiddens"][3, 1] = -made["hiddens"][3, 0]  # cancels in the mean
    result = route_experts(**made, backend=backend.name)
    assert torch.equal(result.probs[[1, 3]], torch.full((2, 4), 0.25, device=backend.device))
    assert torch.equal(result.logits[1], made["bias"])
    cotangent = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).to(backend.device)
    ((result.probs * cotangent).sum() + result.entropy.sum() + result.load_balance_loss).backward(retain_graph=True)
    assert not made["hiddens"].grad[[1, 3]].any()
    assert made["hiddens"].grad[[0, 2, 4]].any()
    made["bias"].grad = None
    only_zero = torch.zeros(5, 1, device=backend.device)
    only_zero[1] = 1
    (result.probs * cotangent * only_zero).sum().backward(retain_graph=True)
    assert not made["bias"].grad.any()
    # The logits of such a row are computed as ever, and so is their gradient.
    (result.logits * only_zero).sum().backward()
    assert torch.equal(made["bias"].grad, torch.ones(4, device=backend.device))
    assert_matches(on(backend), reference.route_experts, made)


def test_threshold_of_a_zero_row(backend: Any) -> None:
    made = arguments(backend, (2, 1, 3, 2), bias=False, requires_grad=False)
    made["hiddens"][0] = 0.99e-10
    made["hiddens"][1] = torch.tensor([0.0, 0.0, 1.01e-10])
    made["weight"] = torch.tensor([[1e10, 0, 0], [0, 0, 0.0]], device=backend.device)
    made["weight"][0, 2] = 1e10
    probs = route_experts(**made, backend=backend.name).probs
    assert probs[0].tolist() == [0.5, 0.5]
    assert probs[1, 0] > 0.7


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_nan_propagates_but_not_out_of_masked_slots(backend: Any, pooling: str) -> None:
    made = arguments(backend, (3, 4, 16, 4), pooling=pooling)
    with torch.no_grad():
        made["hiddens"][0, 2, 3] = float("nan")
    result = route_experts(**made, backend=backend.name)
    assert bool(result.probs[0].isnan().all())
    assert bool(result.load_balance_loss.isnan())
    assert bool(result.probs[1:].isfinite().all())
    mask = torch.ones(3, 4, dtype=torch.bool, device=backend.device)
    mask[0, 2] = False
    made["slot_mask"] = mask
    assert bool(route_experts(**made, backend=backend.name).probs.isfinite().all())
    assert_matches(on(backend), reference.route_experts, made)


@pytest.mark.parametrize("clamp", [None, 10.0], ids=["unclamped", "clamped"])
@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_masked_rows_reach_no_loss(backend: Any, pooling: str, clamp: float | None) -> None:
    made = arguments(backend, (4, 2, 16, 4), pooling=pooling) | {"clamp": clamp}
    made["row_mask"] = torch.tensor([True, False, True, True], device=backend.device)
    with torch.no_grad():
        made["hiddens"][1] = float("nan")
    result = route_experts(**made, backend=backend.name)
    assert bool(result.load_balance_loss.isfinite())
    result.load_balance_loss.backward()
    assert not made["hiddens"].grad[1].any()
    kept = {**made, "hiddens": made["hiddens"].detach()[[0, 2, 3]].requires_grad_(), "row_mask": None}
    expected = route_experts(**kept, backend=backend.name).load_balance_loss
    torch.testing.assert_close(result.load_balance_loss, expected)
    leaves = [name for name, value in kept.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    for name, gradient in zip(leaves, torch.autograd.grad(expected, [kept[x] for x in leaves]), strict=True):
        found = made[name].grad
        torch.testing.assert_close(found[[0, 2, 3]] if name == "hiddens" else found, gradient)
    made["row_mask"] = torch.zeros(4, dtype=torch.bool, device=backend.device)
    assert route_experts(**made, backend=backend.name).load_balance_loss.item() == 0.0


def test_max_pooling_ties_go_to_the_lowest_slot(backend: Any) -> None:
    made = arguments(backend, (2, 4, 8, 3), pooling="max")
    with torch.no_grad():
        made["hiddens"][:, 2] = made["hiddens"][:, 1]
        made["hiddens"][:, 1:3] += 10
    result = route_experts(**made, backend=backend.name)
    result.logits.sum().backward()
    assert not made["hiddens"].grad[:, [0, 2, 3]].any()
    assert made["hiddens"].grad[:, 1].any()


def test_argmax_ties_go_to_the_lowest_expert(backend: Any) -> None:
    probs = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.45, 0.45]], device=backend.device, requires_grad=True)
    load_balance_loss(probs, backend=backend.name).backward()
    # d loss / d p[b, i] = K f_i / B with f = (1/2, 1/2, 0)
    torch.testing.assert_close(probs.grad, torch.tensor([[0.75, 0.75, 0.0]] * 2, device=backend.device))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 7), (0, 4), (2, 300)], ids=str)
def test_row_functions(backend: Any, shape: tuple[int, ...]) -> None:
    logits = (3 * torch.randn(shape)).to(backend.device).requires_grad_()
    temperature = torch.tensor(0.8, device=backend.device, requires_grad=True)
    made = {"logits": logits, "temperature": temperature, "clamp": 2.0}
    assert_matches(on(backend, temperature_softmax), reference.temperature_softmax, made)
    probs = torch.softmax(logits.detach(), -1).requires_grad_()
    assert_matches(on(backend, routing_entropy), reference.routing_entropy, {"probs": probs})
    if len(shape) == 2:
        assert_matches(on(backend, load_balance_loss), reference.load_balance_loss, {"probs": probs})
        row_mask = (torch.rand(shape[0]) > 0.5).to(backend.device)
        made = {"probs": probs, "row_mask": row_mask}
        assert_matches(on(backend, load_balance_loss), reference.load_balance_loss, made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_functions_in_low_precision_and_any_strides(backend: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 5).to(backend.device, dtype).t().requires_grad_()
    assert_matches(on(backend, temperature_softmax), reference.temperature_softmax, {"logits": logits})
    probs = torch.softmax(logits.detach().float(), -1).to(dtype).t().contiguous().t().requires_grad_()
    assert_matches(on(backend, routing_entropy), reference.routing_entropy, {"probs": probs})
    assert_matches(on(backend, load_balance_loss), reference.load_balance_loss, {"probs": probs})


def test_entropy_is_finite_at_zero(backend: Any) -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]], device=backend.device, requires_grad=True)
    entropy = routing_entropy(probs, backend=backend.name)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert bool(probs.grad.isfinite().all())


def test_repeats_bit_for_bit(backend: Any) -> None:
    made = arguments(backend, (37, 3, 40, 5) if not backend.slow else (6, 3, 20, 5), pooling="attention")

    def run() -> list[torch.Tensor]:
        leaves = [made[name] for name in ("hiddens", "weight", "bias", "pool_query")]
        result = route_experts(**made, backend=backend.name)
        return [*result, *torch.autograd.grad(sum(field.sum() for field in result), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads: int) -> None:
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    torch.manual_seed(1)
    hiddens, weight = torch.randn(300, 4, 65, requires_grad=True), torch.randn(6, 65, requires_grad=True)

    def run() -> list[torch.Tensor]:
        result = route_experts(hiddens, weight, backend="cpp")
        return [*result, *torch.autograd.grad(sum(field.sum() for field in result), [hiddens, weight])]

    before = torch.get_num_threads()
    expected = run()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_arguments_are_not_changed(backend: Any) -> None:
    made = arguments(backend, SHAPES["odd"], pooling="max", masks=True)
    copies = {name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)}
    sum(field.sum() for field in route_experts(**made, backend=backend.name)).backward()
    assert all(torch.equal(made[name], copy) for name, copy in copies.items())


def test_properties(backend: Any) -> None:
    """Rows sum to 1; a higher temperature flattens; the loss is 1 when balanced and K when collapsed."""
    made = arguments(backend, (16, 3, 16, 4), requires_grad=False)
    peaks, entropies = [], []
    for temperature in (0.25, 1.0, 4.0):
        result = route_experts(**{**made, "temperature": temperature}, backend=backend.name)
        torch.testing.assert_close(result.probs.sum(1), torch.ones(16, device=backend.device))
        peaks.append(result.probs.amax(1))
        entropies.append(result.entropy)
    assert bool((peaks[0] >= peaks[1]).all())
    assert bool((peaks[1] >= peaks[2]).all())
    assert bool((entropies[0] <= entropies[1] + 1e-6).all())
    assert bool((entropies[1] <= entropies[2] + 1e-6).all())
    assert bool((entropies[2] <= math.log(4) + 1e-5).all())
    eye = torch.eye(4, device=backend.device)
    assert load_balance_loss(eye, backend=backend.name).item() == pytest.approx(1.0)
    assert load_balance_loss(eye[[0, 0, 0]], backend=backend.name).item() == pytest.approx(4.0)


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (3,)], ids=["probs", "logits", "entropy", "loss"])
def test_gradient_of_one_output_alone(backend: Any, outputs: tuple[int, ...]) -> None:
    made = arguments(backend, SHAPES["odd"], masks=True)
    assert_matches(
        lambda **kw: tuple(route_experts(**kw, backend=backend.name)[i] for i in outputs),
        lambda **kw: tuple(reference.route_experts(**kw)[i] for i in outputs),
        made,
    )


@pytest.mark.parametrize("wanted", ["hiddens", "weight", "bias", "temperature", "pool_query"])
def test_gradient_of_one_input_alone(backend: Any, wanted: str) -> None:
    temperature = torch.tensor(0.6, device=backend.device, requires_grad=True)
    made = arguments(backend, SHAPES["odd"], temperature=temperature, pooling="attention", masks=True)
    for name, value in made.items():
        if name != wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
            made[name] = value.detach()
    assert_matches(on(backend), reference.route_experts, made)
