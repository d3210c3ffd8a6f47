"""The scan in Triton, with time-major histories and checkpoints for backward.

A memory that fits goes through all steps in one launch (:mod:`.on_chip`), others by a host loop of steps.

Backward recomputes links and memory of one segment at a time from its snapshot and the saved write weights, two
launches a step, then goes back through its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import on_device
from . import backward, forward, on_chip
from ._launch import INTERFACE, STATE
from .step import SAVED, contiguous


def _by_time(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.transpose(0, 1).contiguous()


def _at(fields: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: field[t] for name, field in fields.items()}


def memory_scan_fwd(
    state: Sequence[Tensor],
    interface: Sequence[Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    checkpoint_every: int,
    save: bool,
) -> list[Tensor]:
    """Launcher of ``memkern::memory_scan_fwd``: one launch, or three a step."""
    first = contiguous(STATE, state)
    (batch, slots, width), heads = first["memory"].shape, first["write_weights"].shape[1]
    steps, read_heads = interface[0].shape[1:3]
    snapshots = max(-(-steps // checkpoint_every) - 1, 0)

    def empty(*shape: int, there: bool = True) -> Tensor:
        return torch.empty(shape if there else (0,), dtype=torch.float32, device=first["memory"].device)

    kept: dict[str, Tensor] = {
        "write_content": empty(steps, batch, heads, slots, there=save),
        "allocation": empty(steps, batch, heads, slots, there=save and track_usage),
        "read_content": empty(steps, batch, read_heads, slots, there=save),
        "mixed": empty(steps, batch, read_heads, slots, there=save and sharpness is not None),
        "usage": empty(steps, batch, slots, there=save and track_usage),
        "read_weights": empty(steps, batch, read_heads, slots, there=save),
        "write_weights": empty(steps, batch, heads, slots, there=save),
    }
    saved = {
        "memory": empty(snapshots, batch, slots, width, there=save),
        "links": empty(snapshots, batch, heads, slots, slots, there=save and track_links),
        "precedence": empty(snapshots, batch, heads, slots, there=save and track_links),
    }
    if batch and on_chip.fits(slots, width, heads):
        last = forward.outputs(first, width, None, track_usage, track_links)
        reads = empty(batch, steps, read_heads, width)
        on_chip.scan(
            first, contiguous(INTERFACE, interface), None if sharpness is None else sharpness.contiguous(),
            None if step_mask is None else step_mask.contiguous(), deallocate, checkpoint_every, reads, last, kept,
            saved, save,
        )  # fmt: skip
    else:
        by_time = empty(steps, batch, read_heads, width)
        last = _step_by_step(
            first, interface, sharpness, step_mask, track_usage, track_links, deallocate,
            checkpoint_every if save else steps, by_time, kept, saved,
        )  # fmt: skip
        reads = by_time.transpose(0, 1).contiguous()
        if save:
            # A history must not share its memory with a result.
            last |= {name: last[name].clone() for name in ("usage", "read_weights", "write_weights")}
    return [
        reads,
        *(last[name] for name in STATE),
        *(kept[name] for name in SAVED),
        *(kept[name] for name in ("usage", "read_weights", "write_weights")),
        *saved.values(),
    ]


def _step_by_step(
    first: dict[str, Tensor],
    interface: Sequence[Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    every: int,
    reads: Tensor,
    kept: dict[str, Tensor],
    saved: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Three launches a step, for a memory of any size; the last state."""
    said = {name: field.transpose(0, 1).contiguous() for name, field in zip(INTERFACE, interface, strict=True)}
    exponents, masks = _by_time(sharpness), _by_time(step_mask)
    # Two sets of everything a step makes, used in turn; what has a history goes there at once.
    made = [forward.outputs(first, reads.shape[-1], sharpness, track_usage, track_links) for _ in range(2)]
    old = first
    for t in range(reads.shape[0]):
        if t > 0 and t % every == 0:
            for name, snapshot in saved.items():
                if snapshot.numel():
                    snapshot[t // every - 1].copy_(old[name])
        new = made[t % 2] | {"reads": reads[t]}
        new |= {name: history[t] for name, history in kept.items() if history.numel()}
        forward.step(
            old, _at(said, t), None if exponents is None else exponents[t], None if masks is None else masks[t],
            track_usage, track_links, deallocate, new,
        )  # fmt: skip
        old = old | {name: new[name] for name in STATE if new[name].numel()}
    return {name: new[name] for name in STATE}


def memory_scan_bwd(
    d_reads: Tensor | None,
    d_memory: Tensor | None,
    d_usage: Tensor | None,
    d_links: Tensor | None,
    d_precedence: Tensor | None,
    d_read_weights: Tensor | None,
    d_write_weights: Tensor | None,
    state: Sequence[Tensor],
    interface: Sequence[Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    saved: Sequence[Tensor],
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    detach_usage: bool,
    checkpoint_every: int,
) -> list[Tensor]:
    """Launcher of ``memkern::memory_scan_bwd``: five launches a step."""
    first = contiguous(STATE, state)
    said = {name: field.transpose(0, 1).contiguous() for name, field in zip(INTERFACE, interface, strict=True)}
    exponents, masks, reads = _by_time(sharpness), _by_time(step_mask), _by_time(d_reads)
    given = (d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights)
    grads: dict[str, Tensor | None] = {
        name: None if grad is None else grad.contiguous() for name, grad in zip(STATE, given, strict=True)
    }
    kept = contiguous((*SAVED, "usage", "read_weights", "write_weights"), saved[:7])
    snapshots = contiguous(("memory", "links", "precedence"), saved[7:])
    steps = said["read_keys"].shape[0]
    found: dict[str, list[Tensor]] = {name: [] for name in (*INTERFACE, "sharpness")}
    for begin in reversed(range(0, steps, checkpoint_every)):
        end = min(begin + checkpoint_every, steps)
        states = _segment(first, kept, snapshots, said, masks, begin, end, checkpoint_every, track_links, deallocate)
        for t in reversed(range(begin, end)):
            new = {name: history[t] if history.numel() else history for name, history in kept.items()}
            new["memory"] = states[t - begin + 1]["memory"]
            made = backward.step(
                grads | {"reads": None if reads is None else reads[t]}, states[t - begin], _at(said, t),
                None if exponents is None else exponents[t], None if masks is None else masks[t], new,
                track_usage, track_links, deallocate, detach_usage,
            )  # fmt: skip
            # What has no gradient comes as an empty vector; an empty batch has gradients of its own shapes.
            grads = {name: made[name] if made[name].shape == first[name].shape else None for name in STATE}
            for name, pieces in found.items():
                pieces.append(made[name])
    empty = first["memory"].new_empty((0,))
    results = []
    for name in STATE:
        grad = grads[name]
        results.append(empty.clone() if grad is None else grad)
    for name, pieces in found.items():
        there = name != "sharpness" or sharpness is not None
        results.append(torch.stack(pieces[::-1], 1) if there else empty.clone())
    return results


def _segment(
    first: dict[str, Tensor],
    kept: dict[str, Tensor],
    snapshots: dict[str, Tensor],
    said: dict[str, Tensor],
    masks: Tensor | None,
    begin: int,
    end: int,
    every: int,
    track_links: bool,
    deallocate: bool,
) -> list[dict[str, Tensor]]:
    """The states before the steps of a segment, and the memory after its last."""

    def small(t: int) -> dict[str, Tensor]:
        """Usage, read and write weights before step t."""
        if t == 0:
            return first
        return first | {
            name: kept[name][t - 1] for name in ("usage", "read_weights", "write_weights") if kept[name].numel()
        }

    now = small(begin)
    if begin > 0:
        now = now | {name: field[begin // every - 1] for name, field in snapshots.items() if field.numel()}
    states = [now]
    for t in range(begin, end):
        old = states[-1]
        mask = None if masks is None else masks[t]
        following = {"memory": torch.empty_like(old["memory"])}
        with on_device(old["memory"]):
            forward.write_memory(
                old["memory"], kept["write_weights"][t], old["read_weights"], _at(said, t), mask, deallocate,
                following["memory"],
            )  # fmt: skip
            if track_links and t + 1 < end:
                following["links"] = torch.empty_like(old["links"])
                following["precedence"] = torch.empty_like(old["precedence"])
                forward.update_links(
                    old["links"], old["precedence"], kept["write_weights"][t], None, mask, following["links"],
                    following["precedence"],
                )  # fmt: skip
        states.append({**old, **small(t + 1), **_large(old), **following})
    return states


def _large(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in ("memory", "links", "precedence")}
