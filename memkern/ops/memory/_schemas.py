"""Raw operators of the memory column, each ``memkern::<name>_<backend>`` for cpp, triton and cuda.

Every floating tensor here is float32, or every one float64 (cpp): the public functions cast before and round after.
Strides are any. Letters as in :mod:`memkern.ops.memory`; S = ceil(T / checkpoint_every) segments.

``memory_step_fwd``, ``memory_scan_fwd``
    ``state`` and ``interface`` are the fields of MemoryState and MemoryInterface in their order; ``sharpness`` is
    (B, R) or (B, T, R), None for the identity; ``step_mask`` (B,) or (B, T) bool. Results, by position, where an
    empty (0,) tensor stands for what does not exist:

    0 reads (B, R, W) or (B, T, R, W); 1 to 6 the new state: memory, usage (empty without track_usage), links and
    precedence (empty without track_links), read_weights, write_weights. Then, empty without ``save``, what backward
    reads; the scan has an axis T in front of each, so that a step's rows are one contiguous block:

    7 write_content (B, H, N), softmax of the write lookup; 8 allocation (B, H, N), empty without track_usage;
    9 read_content (B, R, N), softmax of the read lookup; 10 mixed (B, R, N), read weights before the sharpening, empty
    without sharpness. The scan has three histories and three snapshots more: 11 usage (T, B, N), empty without
    track_usage; 12 read_weights (T, B, R, N); 13 write_weights (T, B, H, N), the state after each step; 14 memory
    (S - 1, B, N, W), 15 links (S - 1, B, H, N, N), 16 precedence (S - 1, B, H, N), the state before steps
    checkpoint_every, 2 checkpoint_every, ...; links and precedence empty without track_links.

    A masked row carries its state on, also in the histories and snapshots; what the saved rows 7 to 10 hold there is
    never read.

``memory_step_bwd``, ``memory_scan_bwd``
    Gradients of the results 0 to 6, None where there is none; the inputs of forward; ``saved``: for the step the
    results 1, 2, 5, 6 (memory, usage, read_weights, write_weights after the step) and 7 to 10, for the scan 7 to 16.
    They return 17 gradients: of the 6 fields of state, of the 10 of interface and of sharpness, empty where the
    forward had none of it (sharpness) or only passed it on (usage without track_usage; links and precedence without
    track_links).

The parts of a step: ``content_weights``, ``sharpen`` (rows (M, N) with one exponent each), ``allocation_weights``,
``update_usage``, ``update_links``, ``directional_weights``, ``read_memory``, ``write_memory``, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memkern.ops._library import define


def segments(steps: int, every: int) -> int:
    """Number of segments of a scan."""
    return -(-steps // every)


# What steps and scans, forward and backward, share of their arguments; a scan has ``checkpoint_every`` beside it.
_INPUTS = "Tensor[] state, Tensor[] interface, Tensor? sharpness, Tensor? step_mask"
_TRACKS = "bool track_usage, bool track_links, bool deallocate"
_GRADS = ", ".join(
    f"Tensor? d_{name}"
    for name in ("reads", "memory", "usage", "links", "precedence", "read_weights", "write_weights")
)  # fmt: skip


def _recurrence(name: str, results: Callable[[dict[str, Any]], list[Tensor]], *arguments: str) -> Any:
    """Define an operator of these arguments whose fake gives ``results(arguments by name)``."""
    said = ", ".join(arguments)
    names = [argument.split()[-1] for argument in said.split(", ")]
    return define(
        name,
        f"({said}) -> Tensor[]",
        lambda *given: results(dict(zip(names, given, strict=True))),
        column="memory",
    )


def _step_results(given: dict[str, Any]) -> list[Tensor]:
    return _outputs(given, ())


def _scan_results(given: dict[str, Any]) -> list[Tensor]:
    memory, usage, links, precedence, read_weights, write_weights = given["state"]
    track_usage, track_links = given["track_usage"], given["track_links"]
    steps = given["interface"][0].shape[1]
    snapshots = max(segments(steps, given["checkpoint_every"]) - 1, 0)

    def history(rows: int, like: Tensor, there: bool = True) -> Tensor:
        return memory.new_empty((rows, *like.shape) if there and given["save"] else (0,))

    return [
        *_outputs(given, (steps,)),
        history(steps, usage, track_usage),
        history(steps, read_weights),
        history(steps, write_weights),
        history(snapshots, memory),
        history(snapshots, links, track_links),
        history(snapshots, precedence, track_links),
    ]


def _outputs(given: dict[str, Any], steps: tuple[int, ...]) -> list[Tensor]:
    memory, usage, links, precedence, read_weights, write_weights = given["state"]
    track_usage, track_links = given["track_usage"], given["track_links"]

    def new(like: Tensor, there: bool = True) -> Tensor:
        return memory.new_empty(like.shape if there else (0,))

    def saved(like: Tensor, there: bool = True) -> Tensor:
        return memory.new_empty((*steps, *like.shape) if there and given["save"] else (0,))

    return [
        memory.new_empty(given["interface"][0].shape),
        new(memory),
        new(usage, track_usage),
        new(links, track_links),
        new(precedence, track_links),
        new(read_weights),
        new(write_weights),
        saved(write_weights),
        saved(write_weights, track_usage),
        saved(read_weights),
        saved(read_weights, given["sharpness"] is not None),
    ]


def _gradients(given: dict[str, Any]) -> list[Tensor]:
    state, sharpness, tracks_links = given["state"], given["sharpness"], given["track_links"]
    there = (True, given["track_usage"], tracks_links, tracks_links, True, True)
    return [
        *(x.new_empty(x.shape if kept else (0,)) for x, kept in zip(state, there, strict=True)),
        *(x.new_empty(x.shape) for x in given["interface"]),
        state[0].new_empty((0,) if sharpness is None else sharpness.shape),
    ]


_BACKWARD = (_GRADS, _INPUTS, "Tensor[] saved", _TRACKS, "bool detach_usage")
STEP_FWD = _recurrence("memory_step_fwd", _step_results, _INPUTS, _TRACKS, "bool save")
STEP_BWD = _recurrence("memory_step_bwd", _gradients, *_BACKWARD)
SCAN_FWD = _recurrence("memory_scan_fwd", _scan_results, _INPUTS, _TRACKS, "int checkpoint_every", "bool save")
SCAN_BWD = _recurrence("memory_scan_bwd", _gradients, *_BACKWARD, "int checkpoint_every")

CONTENT_FWD = define(
    "content_weights_fwd",
    "(Tensor memory, Tensor keys, Tensor strengths, Tensor? slot_mask) -> Tensor",
    lambda memory, keys, strengths, slot_mask: memory.new_empty((*keys.shape[:2], memory.shape[1])),
    column="memory",
)
CONTENT_BWD = define(
    "content_weights_bwd",
    "(Tensor grad, Tensor memory, Tensor keys, Tensor strengths, Tensor? slot_mask, Tensor weights) -> "
    "(Tensor d_memory, Tensor d_keys, Tensor d_strengths)",
    lambda grad, memory, keys, strengths, slot_mask, weights: (
        memory.new_empty(memory.shape),
        keys.new_empty(keys.shape),
        strengths.new_empty(strengths.shape),
    ),
    column="memory",
)
SHARPEN_FWD = define(
    "sharpen_fwd",
    "(Tensor weights, Tensor gamma) -> Tensor",
    lambda weights, gamma: weights.new_empty(weights.shape),
    column="memory",
)
SHARPEN_BWD = define(
    "sharpen_bwd",
    "(Tensor grad, Tensor weights, Tensor gamma, Tensor sharpened) -> (Tensor d_weights, Tensor d_gamma)",
    lambda grad, weights, gamma, sharpened: (weights.new_empty(weights.shape), gamma.new_empty(gamma.shape)),
    column="memory",
)
ALLOCATION_FWD = define(
    "allocation_weights_fwd",
    "(Tensor usage) -> Tensor",
    lambda usage: usage.new_empty(usage.shape),
    column="memory",
)
ALLOCATION_BWD = define(
    "allocation_weights_bwd",
    "(Tensor grad, Tensor usage) -> Tensor",
    lambda grad, usage: usage.new_empty(usage.shape),
    column="memory",
)
USAGE_FWD = define(
    "update_usage_fwd",
    "(Tensor usage, Tensor write_weights, Tensor read_weights, Tensor free_gates) -> Tensor",
    lambda usage, write_weights, read_weights, free_gates: usage.new_empty(usage.shape),
    column="memory",
)
USAGE_BWD = define(
    "update_usage_bwd",
    "(Tensor grad, Tensor usage, Tensor write_weights, Tensor read_weights, Tensor free_gates, bool detach_write) -> "
    "(Tensor d_usage, Tensor d_write_weights, Tensor d_read_weights, Tensor d_free_gates)",
    lambda grad, usage, write_weights, read_weights, free_gates, detach_write: (
        usage.new_empty(usage.shape),
        usage.new_empty(write_weights.shape),
        usage.new_empty(read_weights.shape),
        usage.new_empty(free_gates.shape),
    ),
    column="memory",
)
LINKS_FWD = define(
    "update_links_fwd",
    "(Tensor links, Tensor precedence, Tensor write_weights) -> (Tensor links, Tensor precedence)",
    lambda links, precedence, write_weights: (links.new_empty(links.shape), links.new_empty(precedence.shape)),
    column="memory",
)
LINKS_BWD = define(
    "update_links_bwd",
    "(Tensor? d_links, Tensor? d_precedence, Tensor links, Tensor precedence, Tensor write_weights) -> "
    "(Tensor d_links_in, Tensor d_precedence_in, Tensor d_write_weights)",
    lambda d_links, d_precedence, links, precedence, write_weights: (
        links.new_empty(links.shape),
        links.new_empty(precedence.shape),
        links.new_empty(write_weights.shape),
    ),
    column="memory",
)
DIRECTIONAL_FWD = define(
    "directional_weights_fwd",
    "(Tensor links, Tensor read_weights) -> (Tensor forward, Tensor backward)",
    lambda links, read_weights: (
        links.new_empty((links.shape[0], links.shape[1], *read_weights.shape[1:])),
        links.new_empty((links.shape[0], links.shape[1], *read_weights.shape[1:])),
    ),
    column="memory",
)
DIRECTIONAL_BWD = define(
    "directional_weights_bwd",
    "(Tensor? d_forward, Tensor? d_backward, Tensor links, Tensor read_weights) -> "
    "(Tensor d_links, Tensor d_read_weights)",
    lambda d_forward, d_backward, links, read_weights: (
        links.new_empty(links.shape),
        links.new_empty(read_weights.shape),
    ),
    column="memory",
)
READ_FWD = define(
    "read_memory_fwd",
    "(Tensor memory, Tensor weights) -> Tensor",
    lambda memory, weights: memory.new_empty((*weights.shape[:2], memory.shape[2])),
    column="memory",
)
READ_BWD = define(
    "read_memory_bwd",
    "(Tensor grad, Tensor memory, Tensor weights) -> (Tensor d_memory, Tensor d_weights)",
    lambda grad, memory, weights: (memory.new_empty(memory.shape), memory.new_empty(weights.shape)),
    column="memory",
)
WRITE_FWD = define(
    "write_memory_fwd",
    "(Tensor memory, Tensor weights, Tensor erase_vectors, Tensor write_vectors) -> Tensor",
    lambda memory, weights, erase_vectors, write_vectors: memory.new_empty(memory.shape),
    column="memory",
)
WRITE_BWD = define(
    "write_memory_bwd",
    "(Tensor grad, Tensor memory, Tensor weights, Tensor erase_vectors, Tensor write_vectors) -> "
    "(Tensor d_memory, Tensor d_weights, Tensor d_erase_vectors, Tensor d_write_vectors)",
    lambda grad, memory, weights, erase_vectors, write_vectors: (
        memory.new_empty(memory.shape),
        memory.new_empty(weights.shape),
        memory.new_empty(erase_vectors.shape),
        memory.new_empty(write_vectors.shape),
    ),
    column="memory",
)
