"""The memory's step and scan on every backend: values, every gradient, masks, invariants, and the scan as its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import memkern
from memkern.benchmarks.ops.memory import make_interface, make_state
from memkern.ops import MemoryInterface, MemoryState, initial_memory_state, memory_scan, memory_step
from memkern.reference import memory as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

# (B, N, W, R, H) and why it is here.
SHAPES = {
    "plain": (3, 16, 8, 2, 1),
    "two write heads": (2, 12, 6, 3, 2),
    "odd": (3, 19, 7, 1, 1),  # tails in every axis
    "one slot": (2, 1, 4, 2, 1),
    "narrow": (2, 5, 2, 1, 3),  # with a single column the gradient of a cosine is rounding alone
    "more slots than a vector": (2, 37, 20, 4, 1),
    "wide": (1, 6, 70, 5, 2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no usage": {"track_usage": False},
    "no links": {"track_links": False},
    "neither": {"track_usage": False, "track_links": False, "deallocate": True},
    "deallocate": {"deallocate": True},
    "detached": {"detach_usage": True},
    "sharper": {"sharpness": 2.5},
    "flatter": {"sharpness": 0.7},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def skip_undeclared(backend: Any, op: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip where the backend states that it has no such operator, or not for this dtype."""
    reason = memkern.backends.explain(op, torch.empty(1, dtype=dtype, device=backend.device))[backend.name]
    if reason is not None:
        pytest.skip(f"backend {backend.id}: {reason}")


def skip_half(backend: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The interpreter takes every shape with two of the variants, and every variant with two of the shapes."""
    whole = shape in (SHAPES["two write heads"], SHAPES["odd"]) or options in ({}, VARIANTS["neither"])
    if backend.slow and not whole:
        pytest.skip("slow on the interpreter, which takes another shape with it")


def inputs(
    shape: tuple[int, ...],
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = True,
) -> dict[str, Any]:
    sizes = dict(zip("BNWRH", shape, strict=True)) | ({} if steps is None else {"T": steps})
    generator = torch.Generator().manual_seed(sum(shape))
    made = make_state(sizes, dtype, generator), make_interface(sizes, dtype, generator)
    state, interface = (
        type(fields)(*(field.to(device).requires_grad_(requires_grad) for field in fields)) for fields in made
    )
    return {"state": state, "interface": interface}


def on(backend: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


def at(interface: MemoryInterface, t: int) -> MemoryInterface:
    return MemoryInterface(*(field[:, t] for field in interface))


def step_by_step(
    state: MemoryState, interface: MemoryInterface, *, step_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, MemoryState]:
    reads = []
    for t in range(interface.read_keys.shape[1]):
        mask = None if step_mask is None else step_mask[:, t]
        read, state = memory_step(state, at(interface, t), step_mask=mask, **options)
        reads.append(read)
    return torch.stack(reads, 1), state


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_step(backend: Any, shape: Any, options: Any) -> None:
    skip_half(backend, shape, options)
    skip_undeclared(backend, "memory_step")
    assert_matches(on(backend, memory_step), reference.memory_step, inputs(shape, device=backend.device) | options)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("shape", ["plain", "two write heads", "odd"])
def test_scan(backend: Any, shape: str, options: Any) -> None:
    skip_half(backend, SHAPES[shape], options)
    skip_undeclared(backend, "memory_scan")
    steps = 3 if backend.slow else 7
    made = inputs(SHAPES[shape], steps, device=backend.device)
    assert_matches(on(backend, memory_scan), reference.memory_scan, made | options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_interface(backend: Any, dtype: torch.dtype) -> None:
    """The state is float32 whatever the interface is, and reads take the interface's dtype."""
    for op, steps, function, truth in (
        ("memory_step", None, memory_step, reference.memory_step),
        ("memory_scan", 3, memory_scan, reference.memory_scan),
    ):
        skip_undeclared(backend, op, dtype)
        made = inputs(SHAPES["odd"], steps, dtype, backend.device)
        reads, state = function(**made, backend=backend.name)
        assert reads.dtype == dtype
        assert {field.dtype for field in state} == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert_matches(on(backend, function), truth, made)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_scan_equals_steps(backend: Any, every: int) -> None:
    """Values and gradients, wherever the checkpoints fall; masked steps among them."""
    if backend.slow and every in (3, 7):
        pytest.skip("the interpreter's scan ends before")
    skip_undeclared(backend, "memory_scan")
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    steps = 3 if backend.slow else 7
    made = inputs(SHAPES["two write heads"], steps, dtype, backend.device)
    leaves = [*made["state"], *made["interface"]]
    mask = torch.rand(2, steps, generator=torch.Generator().manual_seed(3)).to(backend.device) > 0.25
    options = {"sharpness": 1.5, "step_mask": mask, "backend": backend.name}
    reads, state = memory_scan(**made, checkpoint_every=every, **options)
    expected_reads, expected = step_by_step(**made, **options)
    cotangents = [torch.randn_like(out) for out in (reads, *state)]
    actual = torch.autograd.grad((reads, *state), leaves, cotangents)
    wanted = torch.autograd.grad((expected_reads, *expected), leaves, cotangents)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for a, e in zip((reads, *state, *actual), (expected_reads, *expected, *wanted), strict=True):
        torch.testing.assert_close(a, e, **close)


def test_masked_rows_keep_their_state_bit_for_bit(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs(SHAPES["plain"], device=backend.device)
    keep = torch.tensor([True, False, True], device=backend.device)
    with torch.no_grad():
        for field in (*made["state"], *made["interface"]):
            field[1] = float("nan")
    reads, state = memory_step(**made, step_mask=keep, backend=backend.name)
    assert not reads[1].any()
    for now, then in zip(state, made["state"], strict=True):
        assert torch.equal(now[1].isnan(), then[1].isnan())
        assert bool(now[[0, 2]].isfinite().all())
    (reads.sum() + sum(field[[0, 2]].sum() for field in state)).backward()
    for field in (*made["state"], *made["interface"]):
        assert bool(field.grad.isfinite().all())
        assert not field.grad[1].any()


def test_a_mask_of_rows_holds_for_every_step_of_a_scan(backend: Any) -> None:
    skip_undeclared(backend, "memory_scan")
    made = inputs(SHAPES["plain"], 2, device=backend.device)
    rows = torch.tensor([True, False, True], device=backend.device)
    reads, state = memory_scan(**made, step_mask=rows, backend=backend.name)
    expected, after = memory_scan(**made, step_mask=rows[:, None].repeat(1, 2), backend=backend.name)
    assert torch.equal(reads, expected)
    for now, then in zip(state, after, strict=True):
        assert torch.equal(now, then)
    with pytest.raises(ValueError, match="step_mask: expected shape \\(3\\)"):
        memory_scan(**made, step_mask=rows[:2], backend=backend.name)


def test_masked_rows_pass_the_gradient_of_the_state(backend: Any) -> None:
    skip_undeclared(backend, "memory_scan")
    made = inputs(SHAPES["plain"], 2, device=backend.device)
    mask = torch.tensor([[True, True], [False, False], [True, False]], device=backend.device)
    _, state = memory_scan(**made, step_mask=mask, backend=backend.name)
    for now, then in zip(state, made["state"], strict=True):
        assert torch.equal(now[1], then[1])
    cotangents = [torch.randn_like(field) for field in state]
    grads = torch.autograd.grad(state, [*made["state"]], cotangents)
    for grad, cotangent in zip(grads, cotangents, strict=True):
        assert torch.equal(grad[1], cotangent[1])


def test_invariants_over_many_steps(backend: Any) -> None:
    """Usage in [0, 1]; links >= 0, no diagonal, rows and columns sum to at most 1; weights are sub-distributions."""
    skip_undeclared(backend, "memory_scan")
    batch, slots, width, read_heads, write_heads = 2, 9, 5, 2, 2
    state = initial_memory_state(batch, slots, width, read_heads, write_heads, device=backend.device)
    rounds, steps = (2, 5) if backend.slow else (40, 75)
    sizes = {"B": batch, "N": slots, "W": width, "R": read_heads, "H": write_heads, "T": steps}
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-5
    for _ in range(rounds):
        interface = make_interface(sizes, torch.float32, generator)
        # Gates that saturate, and strengths that make one-hot weights, are where rounding leaves the ranges.
        interface = interface._replace(
            write_gates=interface.write_gates.round(), allocation_gates=interface.allocation_gates.round(),
            write_strengths=interface.write_strengths * 20,
        )  # fmt: skip
        interface = MemoryInterface(*(field.to(backend.device) for field in interface))
        reads, state = memory_scan(state, interface, backend=backend.name)
        assert bool(reads.isfinite().all())
        assert all(bool(field.isfinite().all()) for field in state)
        assert 0 <= state.usage.min() <= state.usage.max() <= 1
        assert 0 <= state.links.min() <= state.links.max() <= 1
        assert not state.links.diagonal(dim1=-2, dim2=-1).any()
        assert max(state.links.sum(-1).max(), state.links.sum(-2).max()) <= 1 + tolerance
        for weights in (state.precedence, state.read_weights, state.write_weights):
            assert weights.min() >= 0
            assert weights.sum(-1).max() <= 1 + tolerance


@pytest.mark.parametrize("track_links", [True, False])
def test_finite_gradients_from_an_empty_memory(backend: Any, track_links: bool) -> None:
    """At t = 0 every slot is zero and every usage ties: the slopes are steep (1e6) and must be finite."""
    skip_undeclared(backend, "memory_scan")
    made = inputs(SHAPES["plain"], 3, device=backend.device)
    state = initial_memory_state(3, 16, 8, 2, device=backend.device)
    made["state"] = MemoryState(*(field.requires_grad_() for field in state))
    reads, new = memory_scan(**made, track_links=track_links, backend=backend.name)
    (reads.sum() + sum(field.sum() for field in new)).backward()
    for field in (*made["state"], *made["interface"]):
        assert field.grad is None or bool(field.grad.isfinite().all())
    # The first write goes to the lowest slot as far as allocation decides.
    first = memory_step(state, at(made["interface"], 0), backend=backend.name)[1].write_weights
    assert bool((first.argmax(-1) == 0).all())


def test_several_write_heads_allocate_one_after_another(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs((1, 6, 4, 1, 3), device=backend.device, requires_grad=False)
    state = initial_memory_state(1, 6, 4, 1, 3, device=backend.device)
    ones = torch.ones(1, 3, device=backend.device)
    interface = made["interface"]._replace(allocation_gates=ones, write_gates=ones)
    _, new = memory_step(state, interface, backend=backend.name)
    slots = new.write_weights.argmax(-1)[0].tolist()
    assert slots[0] == 0
    assert len(set(slots)) == 3
    assert new.write_weights.amax(-1).min() > 0.99


def test_sharpness_is_never_less_focused(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs(SHAPES["plain"], device=backend.device, requires_grad=False)
    previous = torch.full((3, 2), float("inf"), device=backend.device)
    for sharpness in (0.5, 1.0, 2.0, 8.0, 50.0):
        tensor = torch.full((2,), sharpness, device=backend.device)
        _, state = memory_step(**made, sharpness=tensor, backend=backend.name)
        weights = state.read_weights
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        entropy = torch.special.entr(weights).sum(-1)
        assert bool((entropy <= previous + 1e-6).all())
        previous = entropy


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sharpness_tensor_gets_a_gradient(backend: Any, rank: int) -> None:
    skip_undeclared(backend, "memory_scan")
    made = inputs(SHAPES["plain"], 3, device=backend.device)
    size = ((2,), (3, 2), (3, 3, 2))[rank - 1]
    sharpness = (0.5 + torch.rand(size, device=backend.device)).requires_grad_()
    assert_matches(on(backend, memory_scan), reference_scan, made | {"sharpness": sharpness})


def reference_scan(*, sharpness: Tensor, **made: Any) -> Any:
    """The reference with each kind of sharpness written out, (B, T, R)."""
    rows = made["interface"].read_strengths.shape
    sharpness = sharpness[:, None] if sharpness.dim() == 2 else sharpness
    return reference.memory_scan(**made, sharpness=sharpness.expand(rows))


def test_sharpness_one_is_the_identity(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs(SHAPES["plain"], device=backend.device, requires_grad=False)
    plain, _ = memory_step(**made, backend=backend.name)
    assert torch.equal(memory_step(**made, sharpness=1.0, backend=backend.name)[0], plain)
    assert torch.equal(memory_step(**made, sharpness=1, backend=backend.name)[0], plain)


def test_without_links_a_head_without_content_share_reads_nothing(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs(SHAPES["plain"], device=backend.device)
    with torch.no_grad():
        made["interface"].read_modes[:, 0] = torch.tensor([0.3, 0.0, 0.7])
    reads, state = memory_step(**made, track_links=False, backend=backend.name)
    assert not reads[:, 0].any()
    torch.testing.assert_close(state.read_weights[:, 1].sum(-1), torch.ones(3, device=backend.device))
    assert torch.equal(state.links, made["state"].links)
    assert torch.equal(state.precedence, made["state"].precedence)


def test_detach_usage_stops_the_write_weights_alone(backend: Any) -> None:
    skip_undeclared(backend, "memory_step")
    made = inputs(SHAPES["plain"], device=backend.device)
    for detach in (True, False):
        _, state = memory_step(**made, detach_usage=detach, backend=backend.name)
        grads = torch.autograd.grad(
            state.usage.sum(),
            [made["state"].write_weights, made["state"].read_weights, made["interface"].free_gates],
            allow_unused=True,
            materialize_grads=True,
        )
        assert bool(grads[0].any()) != detach
        assert bool(grads[1].any())
        assert bool(grads[2].any())


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_and_no_steps(backend: Any, batch: int, steps: int) -> None:
    skip_undeclared(backend, "memory_scan")
    made = inputs((batch, 5, 4, 2, 1), steps, device=backend.device)
    reads, state = memory_scan(**made, backend=backend.name)
    assert reads.shape == (batch, steps, 2, 4)
    assert [field.shape for field in state] == [field.shape for field in made["state"]]
    leaves = [*made["state"], *made["interface"]]
    grads = torch.autograd.grad(
        reads.sum() + sum(field.sum() for field in state), leaves, allow_unused=True, materialize_grads=True
    )
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    if steps == 0:
        assert all(torch.equal(now, then) for now, then in zip(state, made["state"], strict=True))


def strided(x: Tensor, how: str) -> Tensor:
    """The same values behind other strides."""
    if how == "slice":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
        view = wide[..., 1 : 2 * x.shape[-1] : 2]
    else:
        view = torch.empty_like(x.transpose(0, -1).contiguous()).transpose(0, -1)
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("how", ["slice", "permuted"])
@pytest.mark.parametrize("steps", [None, 3])
def test_any_strides(backend: Any, steps: int | None, how: str) -> None:
    op, truth = (memory_step, reference.memory_step) if steps is None else (memory_scan, reference.memory_scan)
    skip_undeclared(backend, op.__name__)
    made = inputs(SHAPES["plain"], steps, device=backend.device)
    for name, fields in made.items():
        made[name] = type(fields)(*(strided(field, how) for field in fields))
    mask = torch.rand((3,) if steps is None else (steps, 3)) > 0.3
    made["step_mask"] = mask.t().to(backend.device)
    assert_matches(on(backend, op), truth, made)


def test_initial_state() -> None:
    learned = torch.randn(5, 4, requires_grad=True)
    state = initial_memory_state(3, 5, 4, 2, 2, memory=learned)
    assert [tuple(field.shape) for field in state] == [(3, 5, 4), (3, 5), (3, 2, 5, 5), (3, 2, 5), (3, 2, 5), (3, 2, 5)]
    assert torch.equal(state.memory[1], learned)
    state.memory.sum().backward()
    assert torch.equal(learned.grad, torch.full((5, 4), 3.0))
    state.memory.detach().zero_()
    assert learned.any()
    own = initial_memory_state(2, 5, 4, 1, memory=torch.randn(2, 5, 4, dtype=torch.float64))
    assert {field.dtype for field in own} == {torch.float64}
    assert {field.dtype for field in initial_memory_state(1, 2, 3, 1, memory=torch.ones(2, 3).bfloat16())} == {
        torch.float32
    }


def test_repeats_bit_for_bit_and_changes_no_argument(backend: Any) -> None:
    skip_undeclared(backend, "memory_scan")
    made = inputs(SHAPES["plain"], 3, device=backend.device)
    leaves = [*made["state"], *made["interface"]]
    copies = [leaf.detach().clone() for leaf in leaves]

    def run() -> list[Tensor]:
        reads, state = memory_scan(**made, backend=backend.name)
        grads = torch.autograd.grad(reads.sum() + sum(field.sum() for field in state), leaves)
        return [reads, *state, *grads]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, copies, strict=True))
