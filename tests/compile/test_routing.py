"""Routing under torch.compile and torch.export: no graph break, and our operator, not the reference, in every graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified

import memkern
from memkern.ops import route_experts

CPP = memkern.backends._absent("cpp", "cpu") is None


class Graphs:
    """A compile backend that keeps the forward and backward graphs and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        return aot_module_simplified(
            module, example_inputs, fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    @staticmethod
    def _keep(names: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return compiler


def leaves(device: str) -> tuple[torch.Tensor, ...]:
    made = torch.randn(4, 3, 16), torch.randn(5, 16), torch.randn(5)
    return tuple(x.to(device).requires_grad_() for x in made)


def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    result = route_experts(x, w, b, temperature=0.7, **options)
    return (result.probs**2).sum() + result.logits.sum() + result.entropy.sum() + result.load_balance_loss


def test_our_operator_in_both_graphs(backend: Any) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    inputs = leaves(backend.device)
    expected = torch.autograd.grad(loss(*inputs, backend=backend.name), inputs)
    actual = torch.autograd.grad(compiled(*inputs, backend=backend.name), inputs)
    ours = backend.name != "reference"
    assert (f"memkern.route_experts_fwd_{backend.name}.default" in graphs.forward) == ours
    assert (f"memkern.route_experts_bwd_{backend.name}.default" in graphs.backward) == ours
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_inductor_fullgraph_dynamic(pooling: str) -> None:
    torch._dynamo.reset()
    query = torch.randn(16, requires_grad=True) if pooling == "attention" else None
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x, w, b = leaves("cpu")
        x = torch.randn(rows, 3, 16, requires_grad=True)
        mask = torch.rand(rows, 3) > 0.3
        options = {"pooling": pooling, "pool_query": query, "slot_mask": mask, "row_mask": mask[:, 0]}
        actual = torch.autograd.grad(compiled(x, w, b, **options), (x, w, b))
        expected = torch.autograd.grad(loss(x, w, b, **options), (x, w, b))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_a_changed_backend_recompiles() -> None:
    if not CPP:
        pytest.skip("backend cpp is not here")
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    inputs = leaves("cpu")
    with memkern.use_backend("reference"):
        compiled(*inputs)
    assert not any("memkern" in name for name in graphs.forward)
    with memkern.use_backend("cpp"):
        compiled(*inputs)
    assert any("memkern.route_experts_fwd_cpp" in name for name in graphs.forward)


def test_without_gradients_the_raw_operator_is_called() -> None:
    if not CPP:
        pytest.skip("backend cpp is not here")
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    with torch.no_grad():
        inputs = leaves("cpu")
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    assert any("memkern.route_experts_fwd_cpp" in name for name in graphs.forward)


def test_export() -> None:
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return route_experts(x, self.weight, pooling="max").probs

    router = Router()
    x = torch.randn(4, 3, 16)
    program = torch.export.export(router, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    other = torch.randn(9, 3, 16)
    torch.testing.assert_close(program.module()(other), router(other))
    if CPP:
        assert "route_experts_fwd_cpp" in str(program.graph)
