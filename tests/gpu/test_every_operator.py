"""What every operator owes on a GPU: graphs that replay to the same bits, no synchronisation, other devices' guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memkern import backends
from memkern.backends import BackendUnavailable
from memkern.benchmarks import registry
from memkern.benchmarks.validate import on_backend
from memkern.testing.compare import flatten

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
OPS = list(registry.specs())
DTYPES = ("float32", "bfloat16", "float16")


def prepared(name: str, backend: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The operator on a backend, and arguments at its small shape; skips what the backend declines, with its reason."""
    spec = registry.spec(name)
    reason = backends.explain(name)[backend]
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return on_backend(spec.public, backend), spec.case("small", dtype=dtype, device="cuda").arguments()


def forward_and_backward(function: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    outputs = list(flatten(function(**arguments)).values())
    roots = [out for out in outputs if out.requires_grad]
    leaves = [leaf for leaf in flatten(arguments).values() if leaf.requires_grad]
    grads = torch.autograd.grad(roots, leaves, [torch.ones_like(r) for r in roots], allow_unused=True) if roots else ()
    return [out.detach() for out in outputs] + [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_to_the_same_bits(name: str, kernels: str, dtype: str) -> None:
    function, arguments = prepared(name, kernels, dtype)
    try:
        expected = forward_and_backward(function, arguments)
    except BackendUnavailable as error:
        pytest.skip(str(error).splitlines()[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(function, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = forward_and_backward(function, arguments)
    for _ in range(100):
        for tensor in captured:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want) or torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPS)
def test_the_host_is_never_waited_for(name: str, kernels: str) -> None:
    function, arguments = prepared(name, kernels, "float32")
    forward_and_backward(function, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(function, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in OPS if registry.spec(name).headline])
def test_reduce_overhead_compiles_and_agrees(name: str) -> None:
    spec = registry.spec(name)
    arguments = spec.case("small", device="cuda").arguments(grad=False)
    compiled = torch.compile(spec.public, mode="reduce-overhead", fullgraph=True)
    expected = flatten(spec.public(**arguments))
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        for key, value in flatten(compiled(**arguments)).items():
            torch.testing.assert_close(value, expected[key])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_tensors_device(name: str) -> None:
    spec = registry.spec(name)
    arguments = spec.case("small", device="cuda:1").arguments(grad=False)
    with torch.cuda.device(0):
        assert all(out.device.index == 1 for out in flatten(spec.public(**arguments)).values())
