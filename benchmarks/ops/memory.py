"""Memory: states and interfaces as a trained controller has them, least traffic and arithmetic, and the peers."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memkern.reference import memory as reference
from memkern.reference.memory import MemoryInterface, MemoryState

from ..registry import Case, Cost, Function, OpSpec, Options, Shape, Target, Unsuitable, Work, draw

EPS = 1e-6
Count = Callable[[int, int, int, int, int], int]


def _weights(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """Rows that sum to less than 1, as read and write weights do."""
    raw = torch.softmax(draw(generator, torch.float32, *size, scale=2.0), -1)
    return (raw * _unit(generator, torch.float32, *size[:-1], 1)).to(dtype)


def _unit(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.rand(size, generator=generator, device=generator.device).to(dtype)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_state(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> MemoryState:
    """A state in the middle of a sequence; always float32 or float64."""
    batch, slots, width, read_heads, write_heads = (shape[letter] for letter in "BNWRH")
    f = _state_dtype(dtype)
    links = _weights(generator, f, batch, write_heads, slots, slots) / 2
    return MemoryState(
        memory=draw(generator, f, batch, slots, width),
        usage=_unit(generator, f, batch, slots),
        links=links * (1 - torch.eye(slots, dtype=f, device=generator.device)),
        precedence=_weights(generator, f, batch, write_heads, slots),
        read_weights=_weights(generator, f, batch, read_heads, slots),
        write_weights=_weights(generator, f, batch, write_heads, slots),
    )


def make_interface(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> MemoryInterface:
    """What a controller says, activations applied; with a time axis when the shape has T."""
    batch, width, read_heads, write_heads = (shape[letter] for letter in "BWRH")
    lead = (batch, shape["T"]) if "T" in shape else (batch,)

    def normal(*size: int) -> Tensor:
        return draw(generator, torch.float32, *lead, *size)

    made = MemoryInterface(
        read_keys=normal(read_heads, width),
        read_strengths=1 + F.softplus(normal(read_heads)),
        read_modes=torch.softmax(normal(read_heads, 1 + 2 * write_heads), -1),
        write_keys=normal(write_heads, width),
        write_strengths=1 + F.softplus(normal(write_heads)),
        write_vectors=normal(write_heads, width),
        erase_vectors=torch.sigmoid(normal(write_heads, width)),
        free_gates=torch.sigmoid(normal(read_heads)),
        allocation_gates=torch.sigmoid(normal(write_heads)),
        write_gates=torch.sigmoid(1 + normal(write_heads)),
    )
    return MemoryInterface(*(field.to(dtype) for field in made))


def make_recurrence(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "state": make_state(shape, dtype, generator),
        "interface": make_interface(shape, dtype, generator),
    }
    made |= {name: value for name, value in options.items() if name not in ("mask", "sharp")}
    lead = (shape["B"], shape["T"]) if "T" in shape else (shape["B"],)
    if options.get("sharp"):
        made["sharpness"] = 0.5 + 2 * _unit(generator, _state_dtype(dtype), shape["R"])
    if options.get("mask"):
        made["step_mask"] = torch.rand(lead, generator=generator, device=device) > 0.3
    return made


def work_step(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """Two passes over links and memory forward, three backward (old value, incoming and outgoing gradient)."""
    batch, slots, width, read_heads, write_heads = (shape[letter] for letter in "BNWRH")
    f = _state_dtype(dtype).itemsize
    links = batch * write_heads * slots * slots * f if options.get("track_links", True) else 0
    memory = batch * slots * width * f
    vectors = batch * slots * f
    said = batch * (read_heads * (width + 3 + 2 * write_heads) + write_heads * (3 * width + 3)) * dtype.itemsize
    reads = batch * read_heads * width * dtype.itemsize
    rows = batch * slots * (write_heads * slots * (5 + 4 * read_heads) + width * (6 * read_heads + 12))
    forward = Cost(
        read=links + memory + vectors * (1 + read_heads + 2 * write_heads) + said,
        written=links + memory + vectors * (1 + read_heads + 2 * write_heads) + reads,
        flops=rows,
    )
    backward = Cost(
        read=2 * links + 2 * memory + vectors * (2 + 3 * read_heads + 4 * write_heads) + said + reads,
        written=links + memory + vectors * (1 + read_heads + 2 * write_heads) + said,
        flops=2 * rows,
    )
    return Work(forward, backward)


def work_scan(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """T steps whose links and memory stay where they are computed: only the first and last state travel."""
    step, steps = work_step(shape, options, dtype), shape["T"]
    batch, slots, width, read_heads, write_heads = (shape[letter] for letter in "BNWRH")
    f = _state_dtype(dtype).itemsize
    state = batch * slots * (width + write_heads * slots + 1 + read_heads + 2 * write_heads) * f
    said = batch * (read_heads * (width + 3 + 2 * write_heads) + write_heads * (3 * width + 3)) * dtype.itemsize
    reads = batch * read_heads * width * dtype.itemsize
    forward = Cost(state + steps * said, state + steps * reads, steps * step.forward.flops)
    history = steps * batch * slots * (1 + 2 * read_heads + 3 * write_heads) * f
    backward = Cost(2 * state + steps * (said + reads) + history, state + steps * said, steps * step.backward.flops)
    return Work(forward, backward, saved=history)


def eager_step(
    state: MemoryState, interface: MemoryInterface, *, track_usage: bool = True, track_links: bool = True, **_: Any
) -> tuple[Tensor, MemoryState]:
    """The step as one writes it in plain PyTorch, for one write head."""
    memory, usage, links, precedence, old_reads, old_writes = state
    said = MemoryInterface(*(field.float() if field.dtype.itemsize < 4 else field for field in interface))
    retention = (1 - said.free_gates[..., None] * old_reads).prod(1)
    usage = (usage + old_writes[:, 0] * (1 - usage)) * retention
    ascending, order = torch.sort(EPS + (1 - EPS) * usage, stable=True)
    before = torch.exp(F.pad(ascending.log().cumsum(-1)[:, :-1], (1, 0)))
    free = ((1 - ascending) * before).gather(1, order.argsort(-1))
    looked_up = eager_content(memory, said.write_keys, said.write_strengths)[:, 0]
    allocation, gate = said.allocation_gates, said.write_gates
    writes = gate * (allocation * free + (1 - allocation) * looked_up)
    memory = memory * (1 - writes[..., None] * said.erase_vectors) + writes[..., None] * said.write_vectors
    kept = 1 - writes[:, :, None] - writes[:, None, :]
    diagonal = torch.eye(writes.shape[1], dtype=torch.bool, device=writes.device)
    links = (kept * links[:, 0] + writes[:, :, None] * precedence).masked_fill(diagonal, 0.0)
    precedence = (1 - writes.sum(-1, keepdim=True)) * precedence[:, 0] + writes
    back, ahead = old_reads @ links, old_reads @ links.transpose(1, 2)
    found = eager_content(memory, said.read_keys, said.read_strengths)
    modes = said.read_modes[..., None]
    reads = modes[:, :, 0] * back + modes[:, :, 1] * found + modes[:, :, 2] * ahead
    new = MemoryState(memory, usage, links[:, None], precedence[:, None], reads, writes[:, None])
    return (reads @ memory).to(interface.read_keys.dtype), new


def eager_content(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    norms = torch.rsqrt(memory.square().sum(-1) + EPS * EPS), torch.rsqrt(keys.square().sum(-1) + EPS * EPS)
    scores = (keys @ memory.transpose(1, 2)) * norms[0][:, None] * norms[1][..., None]
    return torch.softmax(strengths[..., None] * scores, -1)


def steps_of(step: Function) -> Function:
    """A scan as a loop over a step."""

    def scan(state: MemoryState, interface: MemoryInterface, **options: Any) -> tuple[Tensor, MemoryState]:
        reads = []
        for t in range(interface.read_keys.shape[1]):
            read, state = step(state, MemoryInterface(*(field[:, t] for field in interface)), **options)
            reads.append(read)
        return torch.stack(reads, 1), state

    return scan


@functools.cache
def _compiled_step() -> Function:
    return torch.compile(eager_step, dynamic=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _steps_as_compiled(state: MemoryState, interface: MemoryInterface, options: Options) -> tuple[Tensor, MemoryState]:
    return steps_of(_compiled_step())(state, interface, **options)


def compiled_steps(state: MemoryState, interface: MemoryInterface, **options: Any) -> tuple[Tensor, MemoryState]:
    """A loop over the compiled step: unrolled into one graph, T steps would take minutes to compile."""
    return _steps_as_compiled(state, interface, options)


def pytorch_dnc(case: Case) -> Function:
    """The memory of PyPI's ``dnc`` on the same inputs, without its linear layers."""
    if case.shape["H"] != 1 or case.options:
        raise Unsuitable("dnc has one write head, no masks and no sharpness")
    if case.dtype not in ("float32", "float64"):
        raise Unsuitable("dnc computes in the dtype of its inputs")
    if case.shape["B"] == 1:
        raise Unsuitable("dnc squeezes a batch of one away")
    for missing in ("faiss", "pyflann"):
        # Only its sparse memories search with these.
        try:
            importlib.import_module(missing)
        except Exception:
            stub = types.ModuleType(missing)
            stub.FLANN = object  # type: ignore[attr-defined]
            sys.modules.setdefault(missing, stub)
    module = importlib.import_module("dnc.memory")
    memory = module.Memory(1, case.shape["N"], case.shape["W"], case.shape["R"])
    memory.I = memory.I.to(case.device)

    def step(state: MemoryState, interface: MemoryInterface) -> tuple[Tensor, MemoryState]:
        hidden = {
            "memory": state.memory,
            "link_matrix": state.links,
            "precedence": state.precedence,
            "read_weights": state.read_weights,
            "write_weights": state.write_weights,
            "usage_vector": state.usage,
        }
        said = interface
        hidden = memory.write(
            said.write_keys, said.write_vectors, said.erase_vectors, said.free_gates, said.read_strengths,
            said.write_strengths, said.write_gates, said.allocation_gates, hidden,
        )  # fmt: skip
        # Its modes lie backward, forward, content.
        reads, hidden = memory.read(said.read_keys, said.read_strengths, said.read_modes[..., [0, 2, 1]], hidden)
        names = ("memory", "usage_vector", "link_matrix", "precedence", "read_weights", "write_weights")
        return reads, MemoryState(*(hidden[name] for name in names))

    return steps_of(step) if "T" in case.shape else step


_VARIANTS: dict[str, Options] = {
    "": {},
    "masked": {"mask": True},
    "sharp": {"sharp": True},
    "deallocate": {"deallocate": True, "detach_usage": True},
    "no-usage": {"track_usage": False},
    "no-links": {"track_links": False, "mask": True},
}

_STEP = {
    "tiny": {"B": 3, "N": 16, "W": 8, "R": 2, "H": 1},
    "odd": {"B": 2, "N": 19, "W": 7, "R": 3, "H": 2},
    "one": {"B": 1, "N": 1, "W": 1, "R": 1, "H": 1},
    "heads": {"B": 2, "N": 37, "W": 20, "R": 5, "H": 3},
    "empty": {"B": 0, "N": 5, "W": 4, "R": 2, "H": 1},
    "small": {"B": 16, "N": 16, "W": 16, "R": 4, "H": 1},
    "medium": {"B": 32, "N": 256, "W": 64, "R": 4, "H": 1},
    "large": {"B": 64, "N": 1024, "W": 64, "R": 4, "H": 1},
    "cpu": {"B": 16, "N": 256, "W": 64, "R": 4, "H": 1},
    "wide": {"B": 8, "N": 64, "W": 768, "R": 4, "H": 1},
}
_SCAN = {
    "tiny": {**_STEP["tiny"], "T": 5},
    "odd": {**_STEP["odd"], "T": 4},
    "one": {**_STEP["one"], "T": 1},
    "heads": {**_STEP["heads"], "T": 3},
    "empty": {**_STEP["empty"], "T": 3},
    "small": {**_STEP["small"], "T": 16},
    "medium": {**_STEP["medium"], "T": 64},
    "large": {**_STEP["large"], "T": 16},
    "cpu": {**_STEP["cpu"], "T": 16},
    "wide": {**_STEP["wide"], "T": 16},
}


def _part(names: str, *more: str) -> Any:
    """Arguments of a part of the step: fields of a state or an interface, by the names the part gives them."""
    pairs = (name.partition("=") for name in names.split())
    chosen = {name: source or name for name, _, source in pairs}

    def make(
        shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        fields = make_state(shape, dtype, generator)._asdict() | make_interface(shape, dtype, generator)._asdict()
        made: dict[str, Any] = {name: fields[source].to(dtype) for name, source in chosen.items()}
        if options.get("mask"):
            mask = torch.rand(shape["B"], shape["N"], generator=generator, device=device) > 0.3
            mask[:1] = False
            made["slot_mask"] = mask
        if "gamma" in more:
            made["gamma"] = 0.5 + 2 * _unit(generator, dtype, shape["B"], shape["R"])
        return made | {name: value for name, value in options.items() if name != "mask"}

    return make


def _part_work(read: Count, written: Count, flops: Count) -> Any:
    """Costs from counts of elements read and written and of operations, by the letters B, N, W, R, H."""

    def work(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
        sizes = [shape[letter] for letter in "BNWRH"]
        inputs, outputs = read(*sizes) * dtype.itemsize, written(*sizes) * dtype.itemsize
        operations = flops(*sizes)
        return Work(Cost(inputs, outputs, operations), Cost(inputs + outputs, inputs, 2 * operations))

    return work


def _part_spec(name: str, arguments: Any, work: Any, variants: Mapping[str, Options] | None = None) -> OpSpec:
    return OpSpec(
        name=name,
        column="memory",
        shapes=_STEP,
        odd=("odd", "one", "heads", "empty"),
        variants=variants or {"": {}},
        make=arguments,
        work=work,
        eager=getattr(reference, name),
    )


_PARTS = (
    _part_spec(
        "content_weights",
        _part("memory keys=read_keys strengths=read_strengths"),
        _part_work(
            lambda B, N, W, R, H: B * N * W + B * R * W + B * R,
            lambda B, N, W, R, H: B * R * N,
            lambda B, N, W, R, H: B * N * W * (2 * R + 2) + 5 * B * R * N,
        ),
        {"": {}, "masked": {"mask": True}},
    ),
    _part_spec(
        "sharpen",
        _part("weights=read_weights", "gamma"),
        _part_work(
            lambda B, N, W, R, H: B * R * N + B * R,
            lambda B, N, W, R, H: B * R * N,
            lambda B, N, W, R, H: 20 * B * R * N,
        ),
    ),
    _part_spec(
        "allocation_weights",
        _part("usage"),
        _part_work(lambda B, N, W, R, H: B * N, lambda B, N, W, R, H: B * N, lambda B, N, W, R, H: B * N * N),
    ),
    _part_spec(
        "update_usage",
        _part("usage write_weights read_weights free_gates"),
        _part_work(
            lambda B, N, W, R, H: B * N * (1 + H + R) + B * R,
            lambda B, N, W, R, H: B * N,
            lambda B, N, W, R, H: B * N * (2 * H + 3 * R + 3),
        ),
        {"": {}, "detached": {"detach_write": True}},
    ),
    _part_spec(
        "update_links",
        _part("links precedence write_weights"),
        _part_work(
            lambda B, N, W, R, H: B * H * N * (N + 2),
            lambda B, N, W, R, H: B * H * N * (N + 1),
            lambda B, N, W, R, H: 5 * B * H * N * N,
        ),
    ),
    _part_spec(
        "directional_weights",
        _part("links read_weights"),
        _part_work(
            lambda B, N, W, R, H: B * H * N * N + B * R * N,
            lambda B, N, W, R, H: 2 * B * H * R * N,
            lambda B, N, W, R, H: 4 * B * H * R * N * N,
        ),
    ),
    _part_spec(
        "read_memory",
        _part("memory weights=read_weights"),
        _part_work(
            lambda B, N, W, R, H: B * N * W + B * R * N,
            lambda B, N, W, R, H: B * R * W,
            lambda B, N, W, R, H: 2 * B * R * N * W,
        ),
    ),
    _part_spec(
        "write_memory",
        _part("memory weights=write_weights erase_vectors write_vectors"),
        _part_work(
            lambda B, N, W, R, H: B * N * W + B * H * (N + 2 * W),
            lambda B, N, W, R, H: B * N * W,
            lambda B, N, W, R, H: 4 * B * H * N * W,
        ),
    ),
)

# Nothing is promised of the wide shape but that nothing else is faster.
_CPU_TARGETS = tuple(
    Target(size, mode, over, least)
    for size, ratios in (("cpu", (("dnc", 5.0), ("compile", 3.0))), ("wide", (("dnc", 1.0), ("compile", 1.0))))
    for mode in ("fwd", "fwd+bwd")
    for over, least in ratios
)

SPECS = (
    OpSpec(
        name="memory_step",
        column="memory",
        shapes=_STEP,
        odd=("odd", "one", "heads", "empty"),
        variants=_VARIANTS,
        make=make_recurrence,
        work=work_step,
        eager=eager_step,
        peers={"dnc": pytorch_dnc},
        headline=True,
        targets=(
            *_CPU_TARGETS,
            Target("large", "fwd", "copy", 0.8, device="cuda"),
            Target("large", "bwd", "copy", 0.75, device="cuda"),
            Target("large", "fwd", "eager", 4.0, device="cuda"),
            Target("large", "fwd", "compile", 1.7, device="cuda"),
        ),
    ),
    OpSpec(
        name="memory_scan",
        column="memory",
        shapes=_SCAN,
        odd=("odd", "one", "heads", "empty"),
        variants=_VARIANTS,
        make=make_recurrence,
        work=work_scan,
        eager=steps_of(eager_step),
        clean=compiled_steps,
        peers={"dnc": pytorch_dnc},
        headline=True,
        targets=(*_CPU_TARGETS, Target("medium", "fwd", "dnc", 50.0, device="cuda")),
    ),
    *_PARTS,
)
