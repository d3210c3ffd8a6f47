"""Expert updates under torch.compile: no graph break, and our operator, not the reference, in both graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import memkern
from memkern.ops import aggregate_experts, gather_slots, scatter_slots, update_experts

IDS, SLOT_IDS = torch.tensor([[7, 5, 9, 7], [9, 9, 1, 2]]), torch.tensor([7, 9, 7])


def leaves(device: str, rows: int = 2) -> tuple[torch.Tensor, ...]:
    made = (
        torch.randn(rows, 4, 16),
        torch.randn(rows, 2, 3, 16),
        torch.rand(rows, 2),
        torch.randn(2, 16, 32) / 4,
        torch.randn(2, 16),
    )
    return tuple(x.to(device).requires_grad_() for x in made)


def step(x: Any, states: Any, probs: Any, weight: Any, bias: Any, ids: Any, slot_ids: Any, backend: Any) -> Any:
    """A model's memory in small: write slots, update, read, splice."""
    hiddens = gather_slots(x, ids, slot_ids, backend=backend)
    states = update_experts(states, hiddens, probs, weight, bias, 2 * weight, None, save="none", backend=backend)
    return scatter_slots(x, aggregate_experts(states, probs, backend=backend), ids, slot_ids, backend=backend)


def test_our_operators_in_both_graphs(backend: Any) -> None:
    if "has no" in (memkern.backends.explain("update_experts")[backend.name] or ""):
        pytest.skip(f"update_experts has no {backend.name} implementation")
    torch._dynamo.reset()
    names: tuple[list[str], list[str]] = ([], [])

    def keep(into: list[str]) -> Any:
        def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
            into.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return module.forward

        return compiler

    compiled = torch.compile(
        step, backend=aot_autograd(fw_compiler=keep(names[0]), bw_compiler=keep(names[1])), fullgraph=True
    )
    inputs = leaves(backend.device)
    fixed = (IDS.to(backend.device), SLOT_IDS.to(backend.device), backend.name)
    actual = torch.autograd.grad(compiled(*inputs, *fixed).square().sum(), inputs)
    expected = torch.autograd.grad(step(*inputs, *fixed).square().sum(), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    for found, direction in zip(names, ("fwd", "bwd"), strict=True):
        for op in ("gather_slots", "update_experts", "aggregate_experts", "scatter_slots"):
            ours = f"memkern.{op}_{direction}_{backend.name}.default" in found
            assert ours == (backend.name != "reference")


def test_inductor_fullgraph_dynamic() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (2, 5):
        inputs = leaves("cpu", rows)
        ids = IDS[:1].expand(rows, -1).contiguous()
        actual = torch.autograd.grad(compiled(*inputs, ids, SLOT_IDS, None).square().sum(), inputs)
        expected = torch.autograd.grad(step(*inputs, ids, SLOT_IDS, None).square().sum(), inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
