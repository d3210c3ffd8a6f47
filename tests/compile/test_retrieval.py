"""Retrieval under torch.compile and torch.export: no graph break, and our operators in forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified

import memkern
from memkern.ops import fuse_sources, retrieved_attention, span_loss

CPP = memkern.backends._absent("cpp", "cpu") is None


def attention_call(device: str, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    leaves = [torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 3, 4, 8)]
    mask = (torch.rand(1, 2, 3, 4) > 0.3).to(device)
    return lambda q, k, v: retrieved_attention(q, k, v, mask=mask, **options).square().sum(), leaves


def bank_call(device: str, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    leaves = [torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)]
    indices = torch.randint(-1, 7, (1, 2, 3, 4)).to(device)
    return lambda q, k, v: retrieved_attention(q, k, v, indices=indices, **options).square().sum(), leaves


def fuse_call(device: str, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    leaves = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 3)]
    return lambda a, b, g: fuse_sources([a, None, b], g, **options).square().sum(), leaves


def span_call(device: str, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    masks = [(torch.rand(4, 9) > share).to(device) for share in (0.7, 0.7, 0.1)]
    document = torch.tensor([0, 0, 1, 2]).to(device)
    return lambda s, e: span_loss(s, e, *masks, document, **options), [torch.randn(4, 9), torch.randn(4, 9)]


CALLS = {
    "retrieved_attention": attention_call,
    "retrieved_attention-bank": bank_call,
    "fuse_sources": fuse_call,
    "span_loss": span_call,
}


@pytest.mark.parametrize("name", CALLS)
def test_our_operator_in_both_graphs(backend: Any, name: str) -> None:
    op = name.partition("-")[0]
    if memkern.backends.explain(op)[backend.name]:
        pytest.skip(f"{op} has no {backend.name} implementation")
    torch._dynamo.reset()
    forward: list[str] = []
    backward: list[str] = []

    def keep(names: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return compiler

    def graphs(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return aot_module_simplified(module, inputs, fw_compiler=keep(forward), bw_compiler=keep(backward))

    function, leaves = CALLS[name](backend.device, backend=backend.name)
    leaves = [leaf.to(backend.device).requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(function(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(function, backend=graphs, fullgraph=True)(*leaves), leaves)
    ours = backend.name != "reference"
    assert (f"memkern.{op}_fwd_{backend.name}.default" in forward) == ours
    assert (f"memkern.{op}_bwd_{backend.name}.default" in backward) == ours
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_inductor_fullgraph_dynamic() -> None:
    torch._dynamo.reset()

    def step(q: torch.Tensor, k: torch.Tensor, i: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        found = retrieved_attention(q, k, k, indices=i).flatten(0, 1)
        return fuse_sources([q.flatten(0, 1), found], g).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for count in (4, 7):
        q, k = torch.randn(2, 2, count, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
        g = torch.randn(4, count, 2, requires_grad=True)
        i = torch.randint(-1, 7, (2, 2, count, 3))
        actual = torch.autograd.grad(compiled(q, k, i, g), (q, k, g))
        for a, e in zip(actual, torch.autograd.grad(step(q, k, i, g), (q, k, g)), strict=True):
            torch.testing.assert_close(a, e)


def test_export() -> None:
    class Retrieval(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return retrieved_attention(q, k, k)

    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 4, 8)
    batch = torch.export.Dim("B", min=2, max=64)
    program = torch.export.export(Retrieval(), (q, k), dynamic_shapes=({0: batch}, {0: batch}))
    q, k = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3, 4, 8)
    torch.testing.assert_close(program.module()(q, k), retrieved_attention(q, k, k))
    if CPP:
        assert "retrieved_attention_fwd_cpp" in str(program.graph)
