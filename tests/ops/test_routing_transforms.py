"""Routing under what surrounds an operator: gradcheck, higher orders, functorch, autocast, opcheck, process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import memkern
from memkern.ops import load_balance_loss, route_experts, routing_entropy, temperature_softmax
from memkern.testing import distributed


def inputs(device: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    made = (torch.randn(3, 4, 5), torch.randn(4, 5), torch.randn(4), torch.tensor(0.7), torch.randn(5))
    return tuple(x.to(device, dtype).requires_grad_() for x in made)


def route(backend: Any, pooling: str = "attention", **extra: Any) -> Any:
    def call(hiddens: Any, weight: Any, bias: Any, temperature: Any, query: Any) -> tuple[torch.Tensor, ...]:
        return tuple(
            route_experts(
                hiddens,
                weight,
                bias,
                temperature=temperature,
                pooling=pooling,
                pool_query=query if pooling == "attention" else None,
                backend=backend.name,
                **extra,
            )
        )

    return call


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_gradcheck(backend: Any, pooling: str) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    mask = torch.tensor([[True, True, False, True]] * 3, device=backend.device)
    assert torch.autograd.gradcheck(route(backend, pooling, slot_mask=mask), inputs(backend.device))


def test_gradgradcheck(backend: Any) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    assert torch.autograd.gradgradcheck(route(backend), inputs(backend.device))


def test_double_backward_in_float32(backend: Any) -> None:
    def second(name: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = inputs(backend.device, torch.float32)
        outputs = route(type(backend)("", name, backend.device))(*leaves)
        first = torch.autograd.grad(sum((o * o).sum() for o in outputs), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

    for actual, expected in zip(second(backend.name), second("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_functorch_and_forward_mode(backend: Any) -> None:
    hiddens, weight, *_ = (x.detach() for x in inputs(backend.device, torch.float32))

    def loss(w: torch.Tensor) -> torch.Tensor:
        return route_experts(hiddens, w, backend=backend.name).entropy.sum()

    plain = weight.clone().requires_grad_()
    expected = torch.autograd.grad(loss(plain), plain)[0]
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    stacked = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(stacked)[0], expected)
    tangent = torch.randn_like(weight)
    _, derivative = torch.func.jvp(loss, (weight,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        out = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(out, derivative)


def test_row_functions_gradcheck(backend: Any) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    logits = torch.randn(3, 4, dtype=torch.float64, device=backend.device, requires_grad=True)
    temperature = torch.tensor(0.8, dtype=torch.float64, device=backend.device, requires_grad=True)
    probs = torch.softmax(logits.detach(), -1).requires_grad_()
    for function, leaves in (
        (lambda z, t: temperature_softmax(z, t, clamp=1.5, backend=backend.name), (logits, temperature)),
        (lambda p: routing_entropy(p, backend=backend.name), (probs,)),
        (lambda p: load_balance_loss(p, backend=backend.name), (probs,)),
    ):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_opcheck(backend: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    x, w, b, t, q = (v.detach().float() for v in inputs(backend.device))
    namespace = torch.ops.memkern
    fwd = getattr(namespace, f"route_experts_fwd_{backend.name}").default
    mask = torch.rand(3, 4, device=backend.device) > 0.3
    # Schema and fake are what opcheck adds; autograd sits above the raw operators.
    utils = ("test_schema", "test_faketensor")
    for pooling, query in ((0, None), (1, None), (2, q)):
        for save in (False, True):
            args = (x, w, b, t, 1.0, pooling, query, mask, None, 10.0, save)
            torch.library.opcheck(fwd, args, test_utils=utils)
        saved = fwd(x, w, b, t, 1.0, pooling, query, mask, None, 10.0, True)[4:]
        grads = (torch.randn(3, 4, device=backend.device), None, torch.randn(3, device=backend.device), None)
        bwd = getattr(namespace, f"route_experts_bwd_{backend.name}").default
        for need in (True, False):
            args = (*grads, x, w, t, 1.0, pooling, query, mask, None, *saved, 10.0, False, need, need, need)
            torch.library.opcheck(bwd, args, test_utils=utils)
    softmax = getattr(namespace, f"temperature_softmax_fwd_{backend.name}").default
    torch.library.opcheck(softmax, (x, t, 1.0, 10.0), test_utils=utils)
    entropy = getattr(namespace, f"routing_entropy_fwd_{backend.name}").default
    torch.library.opcheck(entropy, (torch.softmax(x, -1),), test_utils=utils)
    balance = getattr(namespace, f"load_balance_loss_fwd_{backend.name}").default
    torch.library.opcheck(balance, (torch.softmax(x[0], -1), None), test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Any, dtype: torch.dtype) -> None:
    """float32 parameters with low-precision hiddens: computed in float32, gradients in each input's own dtype."""
    x, w, b, *_ = (v.detach().float() for v in inputs(backend.device))
    hiddens, weight, bias = x.to(dtype).requires_grad_(), w.requires_grad_(), b.requires_grad_()
    with torch.autocast(backend.device, dtype=dtype):
        result = route_experts(hiddens, weight, bias, backend=backend.name)
    expected = route_experts(hiddens, weight, bias, backend="reference")
    assert result.probs.dtype == dtype
    assert result.logits.dtype == result.entropy.dtype == result.load_balance_loss.dtype == torch.float32
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    sum(field.float().sum() for field in result).backward()
    assert hiddens.grad.dtype == dtype
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_checkpointing_and_inference_mode(backend: Any) -> None:
    x, w, b, *_ = (v.detach().float().requires_grad_() for v in inputs(backend.device))

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return route_experts(*leaves, backend=backend.name).entropy.sum()

    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, w, b, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(checkpointed, (x, w, b)), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.inference_mode():
        assert torch.equal(loss(x, w, b), loss(x, w, b))


def _rank(rank: int, folder: str, backend: str) -> None:
    x, w, mask = torch.load(f"{folder}/inputs.pt", weights_only=True)
    rows = slice(0, 3) if rank == 0 else slice(3, 8)
    weight = torch.nn.Parameter(w.clone())
    local = x[rows].clone().requires_grad_()
    group = dist.group.WORLD
    result = route_experts(local, weight, row_mask=mask[rows], process_group=group, temperature=0.5, backend=backend)
    result.load_balance_loss.backward()
    own = load_balance_loss(result.probs.detach(), row_mask=mask[rows], process_group=group, backend=backend)
    grad = weight.grad.clone()
    dist.all_reduce(grad)
    torch.save(
        {"loss": result.load_balance_loss.detach(), "own": own, "weight": grad / 2, "hiddens": local.grad / 2},
        f"{folder}/{rank}.pt",
    )


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_loss_of_the_global_batch(name: str, tmp_path: Path) -> None:
    if memkern.backends._absent(name, "cpu"):
        pytest.skip(f"backend {name} is not here")
    torch.manual_seed(4)
    x, w = torch.randn(8, 3, 16), torch.randn(4, 16)
    x[4] = 0
    mask = torch.tensor([True, True, False, True, True, True, True, False])
    torch.save((x, w, mask), tmp_path / "inputs.pt")
    distributed.spawn(_rank, str(tmp_path), name)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    hiddens, weight = x.requires_grad_(), w.requires_grad_()
    whole = route_experts(hiddens, weight, row_mask=mask, temperature=0.5, backend="reference").load_balance_loss
    whole.backward()
    assert torch.equal(ranks[0]["loss"], ranks[1]["loss"])
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], whole.detach())
        torch.testing.assert_close(rank["own"], whole.detach())
        # DDP takes the mean over ranks; with the factor world size inside, that is one process that saw all rows.
        torch.testing.assert_close(rank["weight"], weight.grad)
    torch.testing.assert_close(torch.cat([r["hiddens"] for r in ranks]), hiddens.grad)
