"""The memory under autograd's other uses: gradcheck, double backward, functorch, opcheck, autocast; time and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import memkern
from memkern import ops
from memkern.benchmarks import registry
from memkern.ops import MemoryInterface, MemoryState, initial_memory_state, memory_scan, memory_step

STATE = len(MemoryState._fields)


def skip_undeclared(backend: Any, op: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip where the backend states that it has no such operator, or not for this dtype."""
    reason = memkern.backends.explain(op, torch.empty(1, dtype=dtype, device=backend.device))[backend.name]
    if reason is not None:
        pytest.skip(f"backend {backend.id}: {reason}")


def case(op: str, dtype: str = "float64", device: str = "cpu", **shape: int) -> dict[str, Any]:
    sizes = {"B": 2, "N": 5, "W": 3, "R": 2, "H": 2} | ({"T": 3} if op == "memory_scan" else {}) | shape
    return registry.spec(op).case(sizes, dtype=dtype, device=device).arguments()


def flat(function: Any, **options: Any) -> Any:
    """The operator as a function of the 16 tensors of a state and an interface, with all results flat."""

    def call(*fields: Tensor) -> tuple[Tensor, ...]:
        reads, state = function(MemoryState(*fields[:STATE]), MemoryInterface(*fields[STATE:]), **options)
        return reads, *state

    return call


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"sharpness": 1.7, "deallocate": True, "step_mask": True},
    "no usage": {"track_usage": False},
    "no links": {"track_links": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("op", ["memory_step", "memory_scan"])
def test_gradcheck(backend: Any, op: str, options: dict[str, Any]) -> None:
    skip_undeclared(backend, op, torch.float64)
    made = case(op, device=backend.device)
    options = dict(options)
    if options.pop("step_mask", False):
        mask = torch.tensor([[True, False, True], [True, True, False]], device=backend.device)
        options["step_mask"] = mask if op == "memory_scan" else mask[:, 1]
    function = flat(getattr(ops, op), backend=backend.name, **options)
    leaves = tuple(leaf for leaf in (*made["state"], *made["interface"]))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)


def test_gradcheck_from_an_empty_memory(backend: Any) -> None:
    """At t = 0 cosines of zero rows have slopes of 1e6, on a scale of 1e-6: the step has to be far below it."""
    skip_undeclared(backend, "memory_step", torch.float64)
    made = case("memory_step", device=backend.device, H=1)
    state = initial_memory_state(2, 5, 3, 2, memory=torch.zeros(5, 3, dtype=torch.float64, device=backend.device))
    function = flat(memory_step, backend=backend.name)

    def of_interface(*fields: Tensor) -> tuple[Tensor, ...]:
        return function(*state, *fields)

    assert torch.autograd.gradcheck(of_interface, tuple(made["interface"]), fast_mode=True, atol=1e-6)

    def of_memory(memory: Tensor) -> tuple[Tensor, ...]:
        # Only what is smooth there: the other fields' order of allocation ties at zero usage.
        return function(memory, *state[1:], *(field.detach() for field in made["interface"]))

    memory = state.memory.clone().requires_grad_()
    assert torch.autograd.gradcheck(of_memory, (memory,), eps=1e-10, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("op", ["memory_step", "memory_scan"])
def test_double_backward(backend: Any, op: str) -> None:
    skip_undeclared(backend, op)
    dtype = "float64" if torch.float64 in backend.dtypes else "float32"
    made = case(op, dtype, backend.device, B=1, N=4)
    leaves = [*made["state"], *made["interface"]]

    def second(backend_name: str) -> list[Tensor]:
        outputs = flat(getattr(ops, op), backend=backend_name, sharpness=1.3)(*leaves)
        loss = sum((out * torch.arange(1.0, out.numel() + 1).to(out).view(out.shape)).sum() for out in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(sum((grad**2).sum() for grad in first), leaves, allow_unused=True))

    for actual, expected in zip(second(backend.name), second("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_parts_gradcheck_twice(backend: Any) -> None:
    for name, argument in (
        ("content_weights", "keys"),
        ("allocation_weights", "usage"),
        ("update_usage", "read_weights"),
        ("update_links", "write_weights"),
        ("directional_weights", "links"),
        ("read_memory", "weights"),
        ("write_memory", "erase_vectors"),
        ("sharpen", "weights"),
    ):
        skip_undeclared(backend, name, torch.float64)
        spec = registry.spec(name)
        made = spec.case({"B": 2, "N": 4, "W": 3, "R": 2, "H": 2}, dtype="float64", device=backend.device).arguments()
        names = list(made)

        def call(*values: Tensor, spec: Any = spec, names: list[str] = names) -> Any:
            return spec.public(**dict(zip(names, values, strict=True)), backend=backend.name)

        assert argument in names
        assert torch.autograd.gradcheck(call, tuple(made.values()))
        assert torch.autograd.gradgradcheck(call, tuple(made.values()), fast_mode=True)


def test_functorch_and_forward_mode(backend: Any) -> None:
    skip_undeclared(backend, "memory_scan")
    made = case("memory_scan", "float32", backend.device)
    leaves = [leaf.detach() for leaf in (*made["state"], *made["interface"])]
    function = flat(memory_scan, backend=backend.name)

    def loss(keys: Tensor) -> Tensor:
        reads, *_ = function(*leaves[:STATE], keys, *leaves[STATE + 1 :])
        return reads.square().sum()

    keys = leaves[STATE].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(keys), keys)
    torch.testing.assert_close(torch.func.grad(loss)(leaves[STATE]), expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    _, slope = torch.func.jvp(loss, (leaves[STATE],), (direction,))
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-3, atol=1e-4)
    many = torch.func.vmap(loss)(torch.stack([leaves[STATE], 2 * leaves[STATE]]))
    torch.testing.assert_close(many[0], loss(leaves[STATE]), rtol=1e-4, atol=1e-5)


def test_opcheck(backend: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    skip_undeclared(backend, "memory_scan")
    namespace, utils = torch.ops.memkern, ("test_schema", "test_faketensor")
    for op, flags in (
        ("memory_step", (True, True, False)),
        ("memory_step", (False, True, True)),
        ("memory_scan", (True, False, False)),
        ("memory_scan", (True, True, False)),
    ):
        made = case(op, "float32", backend.device)
        state, interface = ([x.detach() for x in made[key]] for key in ("state", "interface"))
        sharpness = torch.ones(interface[1].shape, device=backend.device)
        every = () if op == "memory_step" else (2,)
        fwd = getattr(namespace, f"{op}_fwd_{backend.name}").default
        for save in (False, True):
            torch.library.opcheck(fwd, (state, interface, sharpness, None, *flags, *every, save), test_utils=utils)
        results = fwd(state, interface, sharpness, None, *flags, *every, True)
        saved = [results[i] for i in (1, 2, 5, 6)] + results[7:] if op == "memory_step" else results[7:]
        there = (True, True, flags[0], flags[1], flags[1], True, True)
        grads = [torch.randn_like(x) if kept else None for x, kept in zip(results[:7], there, strict=True)]
        bwd = getattr(namespace, f"{op}_bwd_{backend.name}").default
        arguments = (*grads, state, interface, sharpness, None, saved, *flags, False, *every)
        torch.library.opcheck(bwd, arguments, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Any, dtype: torch.dtype) -> None:
    """A low-precision interface with a float32 state: computed in float32, gradients in each input's own dtype."""
    skip_undeclared(backend, "memory_step", dtype)
    made = case("memory_step", "float32", backend.device)
    said = made["interface"]
    said = said._replace(
        read_keys=said.read_keys.detach().to(dtype).requires_grad_(),
        write_vectors=said.write_vectors.detach().to(dtype).requires_grad_(),
    )
    with torch.autocast(backend.device, dtype=dtype):
        reads, state = memory_step(made["state"], said, backend=backend.name)
    expected, _ = memory_step(made["state"], said, backend="reference")
    assert reads.dtype == dtype
    assert {field.dtype for field in state} == {torch.float32}
    torch.testing.assert_close(reads, expected)
    (reads.float().sum() + sum(field.sum() for field in state)).backward()
    assert said.read_keys.grad.dtype == said.write_vectors.grad.dtype == dtype
    assert said.write_keys.grad.dtype == made["state"].links.grad.dtype == torch.float32


def test_checkpointing_and_inference_mode(backend: Any) -> None:
    skip_undeclared(backend, "memory_scan")
    made = case("memory_scan", "float32", backend.device)
    leaves = [*made["state"], *made["interface"]]
    function = flat(memory_scan, backend=backend.name)
    expected = torch.autograd.grad(sum(out.sum() for out in function(*leaves)), leaves)
    outputs = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(sum(out.sum() for out in outputs), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.inference_mode():
        assert torch.equal(function(*leaves)[0], function(*leaves)[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads: int) -> None:
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    made = case("memory_scan", "float32", B=5, N=40)
    leaves = [*made["state"], *made["interface"]]

    def run() -> list[Tensor]:
        outputs = flat(memory_scan, backend="cpp")(*leaves)
        return [*outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), leaves)]

    before = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    try:
        expected = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def saved_bytes(backend: str, steps: int, slots: int) -> int:
    """What autograd holds between forward and backward of a scan, beyond its inputs and results."""
    made = case("memory_scan", "float32", B=1, N=slots, W=4, R=1, H=1, T=steps)
    leaves = [*made["state"], *made["interface"]]
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = flat(memory_scan, backend=backend)(*leaves)
    for tensor in (*leaves, *outputs):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())


def test_a_scan_holds_snapshots_not_links_of_every_step(backend: Any) -> None:
    """Between forward and backward: O(T N) and ceil(T / every) snapshots, never T x N x N."""
    if backend.name == "reference":
        pytest.skip("the reference's checkpoints hold their inputs themselves")
    skip_undeclared(backend, "memory_scan")
    slots, steps = (16, 9) if backend.slow else (64, 64)
    held = saved_bytes(backend.name, steps, slots)
    every = memkern.reference.memory.default_checkpoint_every(steps)
    snapshot = 4 * slots * (slots + 4 + 1)
    rows = 4 * steps * slots * (1 + 2 + 3)
    assert held <= -(-steps // every) * snapshot + rows + 65536
    if not backend.slow:
        assert held < 0.25 * steps * slots * slots * 4


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from memkern.benchmarks import registry
from memkern.ops import memory_scan
steps = int(sys.argv[1])
made = registry.spec("memory_scan").case({"B": 1, "N": 512, "W": 8, "R": 1, "H": 1, "T": steps}).arguments()
def run(count):
    said = type(made["interface"])(*(field[:, :count] for field in made["interface"]))
    reads, state = memory_scan(made["state"], said, backend="cpp")
    (reads.sum() + state.links.sum()).backward()
run(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(steps)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_of_a_scan_grows_with_the_root_of_its_steps() -> None:
    """Measured: 100 steps of 512 slots would hold 100 MiB of links; snapshots and a segment are 20 MiB."""
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    done = subprocess.run([sys.executable, "-c", PEAK, "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 40 * 2**20
