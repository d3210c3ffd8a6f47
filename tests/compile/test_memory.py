"""The memory under torch.compile: no graph break, and our operators, not the reference, in both graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified

import memkern
from memkern import ops
from memkern.benchmarks import registry
from memkern.ops import MemoryInterface, MemoryState


class Graphs:
    """A compile backend that keeps the forward and backward graphs and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        return aot_module_simplified(
            module, example_inputs, fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    @staticmethod
    def _keep(names: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return compiler


def loss(op: str, fields: list[Tensor], **options: Any) -> Tensor:
    state, interface = MemoryState(*fields[:6]), MemoryInterface(*fields[6:])
    reads, new = getattr(ops, op)(state, interface, **options)
    return reads.square().sum() + sum(field.square().sum() for field in new)


def declared(op: str, backend: Any) -> None:
    reason = memkern.backends.explain(op, torch.empty(1, device=backend.device))[backend.name]
    if reason is not None:
        pytest.skip(f"backend {backend.id}: {reason}")


@pytest.mark.parametrize("op", ["memory_step", "memory_scan"])
def test_our_operator_in_both_graphs(backend: Any, op: str) -> None:
    declared(op, backend)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    sizes = {"B": 2, "N": 6, "W": 4, "R": 2, "H": 1} | ({"T": 2} if op == "memory_scan" else {})
    made = registry.spec(op).case(sizes, device=backend.device).arguments()
    fields = [*made["state"], *made["interface"]]
    options = {"sharpness": 1.5, "backend": backend.name}
    expected = torch.autograd.grad(loss(op, fields, **options), fields)
    actual = torch.autograd.grad(compiled(op, fields, **options), fields)
    ours = backend.name != "reference"
    assert (f"memkern.{op}_fwd_{backend.name}.default" in graphs.forward) == ours
    assert (f"memkern.{op}_bwd_{backend.name}.default" in graphs.backward) == ours
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["content_weights", "sharpen", "allocation_weights", "update_usage", "update_links", "read_memory"]
)
def test_parts(backend: Any, name: str) -> None:
    declared(name, backend)
    torch._dynamo.reset()
    graphs = Graphs()
    made = registry.spec(name).case("tiny", device=backend.device).arguments()

    def part(values: dict[str, Any]) -> Tensor:
        result = getattr(ops, name)(**values, backend=backend.name)
        return sum(out.square().sum() for out in ((result,) if isinstance(result, Tensor) else result))

    leaves = list(made.values())
    expected = torch.autograd.grad(part(made), leaves)
    actual = torch.autograd.grad(torch.compile(part, backend=graphs, fullgraph=True)(made), leaves)
    assert any(f"memkern.{name}_bwd" in target for target in graphs.backward) == (backend.name != "reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_inductor_with_dynamic_batches() -> None:
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        made = registry.spec("memory_scan").case({"B": batch, "N": 6, "W": 4, "R": 2, "H": 1, "T": 3}).arguments()
        fields = [*made["state"], *made["interface"]]
        mask = torch.rand(batch, 3) > 0.3
        actual = torch.autograd.grad(compiled("memory_scan", fields, step_mask=mask), fields)
        expected = torch.autograd.grad(loss("memory_scan", fields, step_mask=mask), fields)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_raw_operator_is_called() -> None:
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    torch._dynamo.reset()
    graphs = Graphs()
    made = registry.spec("memory_step").case("tiny").arguments(grad=False)
    fields = [*made["state"], *made["interface"]]
    with torch.no_grad():
        torch.compile(loss, backend=graphs, fullgraph=True)("memory_step", fields)
    assert "memkern.memory_step_fwd_cpp.default" in graphs.forward
