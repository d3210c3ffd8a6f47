"""Launchers of one step, forward and backward, on the raw operators' lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import backward, forward
from ._launch import INTERFACE, STATE

SAVED = ("write_content", "allocation", "read_content", "mixed")


def contiguous(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in zip(names, tensors, strict=True)}


def memory_step_fwd(
    state: Sequence[Tensor],
    interface: Sequence[Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    save: bool,
) -> list[Tensor]:
    """Launcher of ``memkern::memory_step_fwd``: three launches."""
    old, said = contiguous(STATE, state), contiguous(INTERFACE, interface)
    sharpness = None if sharpness is None else sharpness.contiguous()
    step_mask = None if step_mask is None else step_mask.contiguous()
    made = forward.outputs(old, said["read_keys"].shape[-1], sharpness, track_usage, track_links)
    forward.step(old, said, sharpness, step_mask, track_usage, track_links, deallocate, made)
    results = [made["reads"], *(made[name] for name in STATE)]
    return results + [made[name] if save else made[name].new_empty((0,)) for name in SAVED]


def memory_step_bwd(
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
) -> list[Tensor]:
    """Launcher of ``memkern::memory_step_bwd``: three launches."""
    given = (d_reads, d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights)
    grads = {
        name: None if grad is None else grad.contiguous() for name, grad in zip(("reads", *STATE), given, strict=True)
    }
    old, said = contiguous(STATE, state), contiguous(INTERFACE, interface)
    new = contiguous(("memory", "usage", "read_weights", "write_weights", *SAVED), saved)
    sharpness = None if sharpness is None else sharpness.contiguous()
    step_mask = None if step_mask is None else step_mask.contiguous()
    made = backward.step(
        grads, old, said, sharpness, step_mask, new, track_usage, track_links, deallocate, detach_usage
    )
    return [made[name] for name in (*STATE, *INTERFACE, "sharpness")]
