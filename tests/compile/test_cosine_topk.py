"""Search under torch.compile and torch.export: no graph break, and our operator, not the reference, in every graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified

import memkern
from memkern.ops import cosine_topk, inverse_norms

CPP = memkern.backends._absent("cpp", "cpu") is None


class Graphs:
    """A compile backend that keeps the forward and backward graphs and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.compiled = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        self.compiled += 1
        return aot_module_simplified(
            module, example_inputs, fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    @staticmethod
    def _keep(names: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return compiler


def leaves(device: str, count: int = 3, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    queries, database = torch.randn(count, 8), torch.randn(rows, 8)
    return queries.to(device).requires_grad_(), database.to(device).requires_grad_()


def loss(queries: torch.Tensor, database: torch.Tensor, **options: Any) -> torch.Tensor:
    norms = inverse_norms(database, backend=options.get("backend"))
    found = cosine_topk(queries, database, 4, **options)
    return found.scores.square().sum() + norms.sum() + (found.indices * 0).sum()


def test_our_operators_in_both_graphs(backend: Any) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    inputs = leaves(backend.device)
    expected = torch.autograd.grad(loss(*inputs, backend=backend.name), inputs)
    actual = torch.autograd.grad(compiled(*inputs, backend=backend.name), inputs)
    ours = backend.name != "reference"
    for op in ("cosine_topk", "inverse_norms"):
        assert (f"memkern.{op}_fwd_{backend.name}.default" in graphs.forward) == ours
        assert (f"memkern.{op}_bwd_{backend.name}.default" in graphs.backward) == ours
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_inductor_fullgraph_dynamic() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count, rows in ((3, 12), (7, 30)):
        inputs = leaves("cpu", count, rows)
        options = {
            "valid": torch.rand(rows) > 0.2,
            "query_group": torch.zeros(count, dtype=torch.int64),
            "row_group": (torch.rand(rows) > 0.9).long(),
            "min_score": -0.9,
        }
        actual = torch.autograd.grad(compiled(*inputs, **options), inputs)
        expected = torch.autograd.grad(loss(*inputs, **options), inputs)
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
    assert any("memkern.cosine_topk_fwd_cpp" in name for name in graphs.forward)


def test_other_sizes_recompile_once() -> None:
    if not CPP:
        pytest.skip("backend cpp is not here")
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    for count, rows in ((3, 12), (5, 20), (6, 31), (9, 40)):
        compiled(*leaves("cpu", count, rows))
    assert graphs.compiled <= 2


def test_export() -> None:
    class Searcher(torch.nn.Module):
        def forward(self, queries: torch.Tensor, database: torch.Tensor) -> torch.Tensor:
            return cosine_topk(queries, database, 2).indices

    queries, database = (x.detach() for x in leaves("cpu"))
    rows = torch.export.Dim("N", min=2, max=1000)
    program = torch.export.export(Searcher(), (queries, database), dynamic_shapes=({}, {0: rows}))
    other = torch.randn(37, 8)
    assert torch.equal(program.module()(queries, other), Searcher()(queries, other))
    if CPP:
        assert "cosine_topk_fwd_cpp" in str(program.graph)
