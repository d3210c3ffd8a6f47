"""Every operator under torch.compile and torch.export: no graph break, and ours, not the reference, in each graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import memkern
from memkern.benchmarks import registry

CPP = memkern.backends._absent("cpp", "cpu") is None
needs_cpp = pytest.mark.skipif(not CPP, reason="backend cpp is not here")
# An argument that takes another path through dispatch or autograd than the first variant does.
FURTHER = [("retrieved_attention", "masked-bank"), ("route_experts", "masked-attention"), ("fuse_sources", "absent"),
           ("cosine_topk", "filters")]  # fmt: skip
CASES = [(name, next(iter(spec.variants))) for name, spec in registry.specs().items()] + FURTHER
# By operator, two sizes that differ in what changes from call to call.
SIZES = {
    "route_experts": ({"B": 4}, {"B": 7}),
    "update_experts": ({"B": 2}, {"B": 5}),
    "memory_step": ({"B": 2}, {"B": 3}),
    "cosine_topk": ({"Q": 3, "N": 12}, {"Q": 5, "N": 37}),
    "retrieved_attention": ({"B": 2}, {"B": 5}),
}


def made(name: str, variant: str | None = None, device: str = "cpu", grad: bool = True, **sizes: int) -> dict[str, Any]:
    spec = registry.spec(name)
    return spec.case(registry.override(spec, "tiny", sizes), variant=variant, device=device).arguments(grad=grad)


def outputs_of(name: str, backend: str | None = None) -> Callable[[dict[str, Any]], list[Tensor]]:
    public = registry.spec(name).public
    return lambda arguments: tree_leaves(public(**arguments, backend=backend))


def loss_of(name: str, backend: str | None = None) -> Callable[[dict[str, Any]], Tensor]:
    outputs = outputs_of(name, backend)
    return lambda arguments: sum(out.square().sum() for out in outputs(arguments) if out.is_floating_point())


@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda value: value or "plain")
def test_our_operator_in_both_graphs(backend: Any, graphs: Any, name: str, variant: str) -> None:
    reason = memkern.backends.explain(name, torch.empty(1, 1, 1, device=backend.device))[backend.name]
    if reason is not None:
        pytest.skip(f"backend {backend.id}: {reason}")
    short = {"T": 2} if name == "memory_scan" else {}  # the reference and the interpreter trace step by step
    arguments = made(name, variant, backend.device, **short)
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = loss_of(name, backend.name)
    expected = torch.autograd.grad(loss(arguments), leaves)
    actual = torch.autograd.grad(torch.compile(loss, backend=graphs, fullgraph=True)(arguments), leaves)
    ours = backend.name != "reference"
    assert (f"memkern.{name}_fwd_{backend.name}.default" in graphs.forward) == ours
    assert (f"memkern.{name}_bwd_{backend.name}.default" in graphs.backward) == ours
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("name", SIZES)
def test_without_gradients_the_raw_operator_is_called(graphs: Any, name: str) -> None:
    arguments, outputs = made(name, grad=False), outputs_of(name)
    with torch.no_grad():
        actual = torch.compile(outputs, backend=graphs, fullgraph=True)(arguments)
        for a, e in zip(actual, outputs(arguments), strict=True):
            assert torch.equal(a, e)
    assert f"memkern.{name}_fwd_cpp.default" in graphs.forward


@needs_cpp
def test_a_changed_backend_recompiles(graphs: Any) -> None:
    compiled = torch.compile(loss_of("route_experts"), backend=graphs, fullgraph=True)
    arguments = made("route_experts")
    with memkern.use_backend("reference"):
        compiled(arguments)
    assert not any("memkern" in name for name in graphs.forward)
    with memkern.use_backend("cpp"):
        compiled(arguments)
    assert "memkern.route_experts_fwd_cpp.default" in graphs.forward


@needs_cpp
@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_recompile_once(graphs: Any, name: str) -> None:
    compiled = torch.compile(loss_of(name), backend=graphs, fullgraph=True)
    one, other = SIZES[name]
    for sizes in (one, other, {letter: size + 4 for letter, size in other.items()}):
        compiled(made(name, **sizes))
    assert graphs.compiled <= 2


@pytest.mark.parametrize("name", SIZES)
def test_export(name: str) -> None:
    outputs = outputs_of(name)

    class Module(torch.nn.Module):
        def forward(self, arguments: dict[str, Any]) -> list[Tensor]:
            return outputs(arguments)

    one, other = (made(name, grad=False, **sizes) for sizes in SIZES[name])

    def differ(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return None
        return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(a.shape) if size != b.shape[axis]}

    program = torch.export.export(Module(), (one,), dynamic_shapes={"arguments": tree_map(differ, one, other)})
    for a, e in zip(program.module()(other), outputs(other), strict=True):
        torch.testing.assert_close(a, e)
    if CPP:
        assert f"{name}_fwd_cpp" in str(program.graph)
