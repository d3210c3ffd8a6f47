"""The memory of the Differentiable Neural Computer in pure PyTorch: what the compiled backends have to compute.

Source: Graves et al., "Hybrid computing using a neural network with dynamic external memory", Nature 538 (2016),
Methods; several write heads as in DeepMind's release; ``deallocate`` and the sharpening of the read weights after
Csordas and Schmidhuber, "Improving Differentiable Neural Computers Through Memory Masking, De-allocation, and Link
Distribution Sharpness Control" (2019).

Letters: B batch, N slots, W slot width, R read heads, H write heads, T steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkern.reference._common import compute_dtype, full_precision

NORM_EPS = 1e-12
USAGE_EPS = 1e-6


class MemoryState(NamedTuple):
    """The memory between two steps, float32 (float64 for float64)."""

    memory: Tensor
    """(B, N, W)"""
    usage: Tensor
    """(B, N) in [0, 1]"""
    links: Tensor
    """(B, H, N, N); ``links[b, h, i, j]``: slot i was written right after slot j."""
    precedence: Tensor
    """(B, H, N)"""
    read_weights: Tensor
    """(B, R, N)"""
    write_weights: Tensor
    """(B, H, N)"""


class MemoryInterface(NamedTuple):
    """What a controller says to the memory, activations applied; for a scan each field has an axis T after B."""

    read_keys: Tensor
    """(B, R, W)"""
    read_strengths: Tensor
    """(B, R), >= 0"""
    read_modes: Tensor
    """(B, R, 1 + 2 H): backward (H), content, forward (H); sums to 1."""
    write_keys: Tensor
    """(B, H, W)"""
    write_strengths: Tensor
    """(B, H), >= 0"""
    write_vectors: Tensor
    """(B, H, W)"""
    erase_vectors: Tensor
    """(B, H, W) in [0, 1]"""
    free_gates: Tensor
    """(B, R) in [0, 1]"""
    allocation_gates: Tensor
    """(B, H) in [0, 1]"""
    write_gates: Tensor
    """(B, H) in [0, 1]"""


def initial_memory_state(
    batch: int,
    slots: int,
    width: int,
    read_heads: int,
    write_heads: int = 1,
    *,
    device: torch.device | str | None = None,
    memory: Tensor | None = None,
) -> MemoryState:
    """A state that was never written; arguments as :func:`memkern.ops.memory.initial_memory_state`."""
    dtype = torch.float32 if memory is None else compute_dtype(memory)
    if memory is not None and device is None:
        device = memory.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if memory is None:
        content = zeros(batch, slots, width)
    else:
        content = memory.to(device, dtype).expand(batch, slots, width).clone(memory_format=torch.contiguous_format)
    return MemoryState(
        content,
        zeros(batch, slots),
        zeros(batch, write_heads, slots, slots),
        zeros(batch, write_heads, slots),
        zeros(batch, read_heads, slots),
        zeros(batch, write_heads, slots),
    )


def _unit(x: Tensor) -> Tensor:
    """Rows of about unit length; a zero row stays zero, with a finite gradient."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def content_weights(memory: Tensor, keys: Tensor, strengths: Tensor, *, slot_mask: Tensor | None = None) -> Tensor:
    """(B, N, W), (B, H, W), (B, H) -> (B, H, N): softmax over the slots of strength times cosine."""
    with full_precision(memory):
        dtype = compute_dtype(memory, keys, strengths)
        m = memory.to(dtype)
        if slot_mask is not None:
            m = torch.where(slot_mask[..., None], m, 0.0)
        scores = strengths.to(dtype)[..., None] * (_unit(keys.to(dtype)) @ _unit(m).transpose(-1, -2))
        if slot_mask is None:
            return torch.softmax(scores, -1).to(memory.dtype)
        # A row without any slot takes zeros into the softmax, whose result is then dropped: no NaN either way.
        present = slot_mask.any(-1)[:, None, None]
        scores = torch.where(slot_mask[:, None, :], scores, torch.where(present, -math.inf, 0.0))
        return torch.where(present, torch.softmax(scores, -1), 0.0).to(memory.dtype)


def sharpen(weights: Tensor, gamma: float | Tensor) -> Tensor:
    """(..., N) -> (..., N): w^gamma / sum w^gamma by way of logarithms; an all-zero row stays zero."""
    w = weights.to(compute_dtype(weights))
    exponent = gamma.to(w.dtype)[..., None] if isinstance(gamma, Tensor) else gamma
    # Below the normal numbers 1 / w overflows; such a weight counts as zero.
    positive = w >= torch.finfo(w.dtype).tiny
    logs = torch.log(torch.where(positive, w, 1.0))
    if w.shape[-1]:
        # Shifted by a constant, the sum that is gamma's gradient cancels less.
        logs = logs - torch.where(positive, logs, -math.inf).amax(-1, keepdim=True).detach().nan_to_num(neginf=0.0)
    logits = exponent * logs
    present = positive.any(-1, keepdim=True)
    logits = torch.where(positive, logits, torch.where(present, -math.inf, 0.0))
    sharpened = torch.where(present, torch.softmax(logits, -1), 0.0)
    # Comparisons with NaN are False; adding 0 * NaN keeps it visible.
    return (sharpened + torch.where(w.isnan(), w, 0.0).sum(-1, keepdim=True)).to(weights.dtype)


def allocation_weights(usage: Tensor) -> Tensor:
    """(B, N) -> (B, N): (1 - u_i) times the usage of every less used slot; ties go to the lowest slot.

    The order carries no gradient. Usage enters as 1e-6 + (1 - 1e-6) u, into the order too, so that products keep a
    gradient; they are summed as logarithms.
    """
    u = usage.to(compute_dtype(usage))
    entered = USAGE_EPS + (1 - USAGE_EPS) * u
    order = torch.argsort(entered.detach(), dim=-1, stable=True)
    logs = torch.log(entered.gather(-1, order))
    before = F.pad(logs.cumsum(-1)[..., :-1], (1, 0))
    allocated = (1 - USAGE_EPS) * (1 - u.gather(-1, order)) * torch.exp(before)
    return allocated.gather(-1, torch.argsort(order, dim=-1)).to(usage.dtype)


def _written(write_weights: Tensor) -> Tensor:
    """(B, H, N) -> (B, N): 1 - prod_h (1 - w_h)."""
    total = write_weights[:, 0]
    for head in range(1, write_weights.shape[1]):
        total = total + write_weights[:, head] * (1 - total)
    return total


def _retention(read_weights: Tensor, free_gates: Tensor) -> Tensor:
    """(B, R, N), (B, R) -> (B, N): prod_r (1 - f_r w_r)."""
    kept = 1 - free_gates[..., None] * read_weights
    total = kept[:, 0]
    for head in range(1, kept.shape[1]):
        total = total * kept[:, head]
    return total


def update_usage(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor, *, detach_write: bool = False
) -> Tensor:
    """(B, N), (B, H, N), (B, R, N), (B, R) -> (B, N): (u + w - u w) times the retention prod_r (1 - f_r w_r)."""
    dtype = compute_dtype(usage, write_weights, read_weights, free_gates)
    u, written = usage.to(dtype), _written(write_weights.to(dtype))
    if detach_write:
        written = written.detach()
    retention = _retention(read_weights.to(dtype), free_gates.to(dtype))
    return ((u + written * (1 - u)) * retention).clamp(0, 1).to(usage.dtype)


def update_links(links: Tensor, precedence: Tensor, write_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, N), (B, H, N), (B, H, N) -> links and precedence.

    links[i, j] = (1 - w_i - w_j) links[i, j] + w_i precedence[j] off the diagonal, zero on it; then precedence =
    (1 - sum w) precedence + w. Factors that rounding pushes below zero are zero.
    """
    dtype = compute_dtype(links, precedence, write_weights)
    w, p = write_weights.to(dtype), precedence.to(dtype)
    kept = (1 - w[..., :, None] - w[..., None, :]).clamp(min=0)
    updated = kept * links.to(dtype) + w[..., :, None] * p[..., None, :]
    diagonal = torch.eye(w.shape[-1], dtype=torch.bool, device=w.device)
    followed = (1 - w.sum(-1, keepdim=True)).clamp(min=0) * p + w
    return updated.masked_fill(diagonal, 0.0).to(links.dtype), followed.to(links.dtype)


def directional_weights(links: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, N), (B, R, N) -> forward and backward, (B, H, R, N) each: L w and L^T w."""
    with full_precision(links):
        dtype = compute_dtype(links, read_weights)
        matrix, w = links.to(dtype), read_weights.to(dtype)[:, None]
        return (w @ matrix.transpose(-1, -2)).to(links.dtype), (w @ matrix).to(links.dtype)


def read_memory(memory: Tensor, weights: Tensor) -> Tensor:
    """(B, N, W), (B, R, N) -> (B, R, W)."""
    with full_precision(memory):
        dtype = compute_dtype(memory, weights)
        return (weights.to(dtype) @ memory.to(dtype)).to(memory.dtype)


def write_memory(memory: Tensor, weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor) -> Tensor:
    """(B, N, W), (B, H, N), (B, H, W), (B, H, W) -> (B, N, W): M prod_h (1 - w_h e_h^T) + sum_h w_h v_h^T."""
    with full_precision(memory):
        dtype = compute_dtype(memory, weights, erase_vectors, write_vectors)
        w, erase = weights.to(dtype), erase_vectors.to(dtype)
        m = memory.to(dtype)
        for head in range(w.shape[1]):
            m = m * (1 - w[:, head, :, None] * erase[:, head, None, :])
        return (m + w.transpose(-1, -2) @ write_vectors.to(dtype)).to(memory.dtype)


def memory_step(
    state: MemoryState,
    interface: MemoryInterface,
    *,
    sharpness: float | Tensor | None = None,
    step_mask: Tensor | None = None,
    track_usage: bool = True,
    track_links: bool = True,
    deallocate: bool = False,
    detach_usage: bool = False,
) -> tuple[Tensor, MemoryState]:
    """One write and one read; arguments and results as :func:`memkern.ops.memory.memory_step`."""
    dtype = compute_dtype(*state, *interface)
    given = MemoryState(*(field.to(dtype) for field in state))
    with full_precision(given.memory):
        old = given
        said = MemoryInterface(*(field.to(dtype) for field in interface))
        if step_mask is not None:
            # What a masked row holds, NaN included, must reach no product whose gradient would be 0 * NaN.
            old = MemoryState(*(_where(step_mask, field, 0.0) for field in old))
            said = MemoryInterface(*(_where(step_mask, field, 0.0) for field in said))
        reads, new = _step(old, said, sharpness, track_usage, track_links, deallocate, detach_usage)
        if step_mask is not None:
            reads = _where(step_mask, reads, 0.0)
            new = MemoryState(*(_where(step_mask, now, then) for now, then in zip(new, given, strict=True)))
        return reads.to(interface.read_keys.dtype), new


def _where(mask: Tensor, kept: Tensor, other: Tensor | float) -> Tensor:
    """``kept`` in the rows of the batch where ``mask`` is True."""
    return torch.where(mask.view(-1, *(1,) * (kept.dim() - 1)), kept, other)


def _step(
    old: MemoryState,
    said: MemoryInterface,
    sharpness: float | Tensor | None,
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    detach_usage: bool,
) -> tuple[Tensor, MemoryState]:
    heads, slots = old.write_weights.shape[1:]
    usage = old.usage
    if track_usage:
        usage = update_usage(usage, old.write_weights, old.read_weights, said.free_gates, detach_write=detach_usage)
    memory = old.memory
    if deallocate:
        memory = memory * _retention(old.read_weights, said.free_gates)[..., None]
    looked_up = content_weights(memory, said.write_keys, said.write_strengths)
    simulated, written = usage, []
    for head in range(heads):
        gate, towards_free = said.write_gates[:, head, None], said.allocation_gates[:, head, None]
        if track_usage:
            free = allocation_weights(simulated)
            if head + 1 < heads:
                # The next head finds this one's slots as used as they will be.
                simulated = simulated + (1 - simulated) * (gate * towards_free * free)
        else:
            free = torch.full_like(usage, 1.0 / slots)
        written.append(gate * (towards_free * free + (1 - towards_free) * looked_up[:, head]))
    write_weights = torch.stack(written, 1)
    memory = write_memory(memory, write_weights, said.erase_vectors, said.write_vectors)

    found = content_weights(memory, said.read_keys, said.read_strengths)
    modes = said.read_modes[..., None]
    links, precedence = old.links, old.precedence
    if track_links:
        links, precedence = update_links(links, precedence, write_weights)
        ahead, back = directional_weights(links, old.read_weights)
        read_weights = modes[:, :, heads] * found
        for head in range(heads):
            read_weights = read_weights + modes[:, :, head] * back[:, head]
            read_weights = read_weights + modes[:, :, heads + 1 + head] * ahead[:, head]
    else:
        read_weights = torch.where(modes[:, :, heads] == 0, 0.0, found)
    if isinstance(sharpness, Tensor) or (sharpness is not None and sharpness != 1):
        exponent = sharpness.expand(read_weights.shape[:2]) if isinstance(sharpness, Tensor) else sharpness
        read_weights = sharpen(read_weights, exponent)
    return read_memory(memory, read_weights), MemoryState(memory, usage, links, precedence, read_weights, write_weights)


def memory_scan(
    state: MemoryState,
    interface: MemoryInterface,
    *,
    sharpness: float | Tensor | None = None,
    step_mask: Tensor | None = None,
    track_usage: bool = True,
    track_links: bool = True,
    deallocate: bool = False,
    detach_usage: bool = False,
    checkpoint_every: int | None = None,
) -> tuple[Tensor, MemoryState]:
    """T calls of :func:`memory_step`; with a gradient, each segment of ``checkpoint_every`` steps is recomputed."""
    steps = interface.read_keys.shape[1]
    every = checkpoint_every or default_checkpoint_every(steps)
    dtype = compute_dtype(*state, *interface)
    state = MemoryState(*(field.to(dtype) for field in state))
    options: dict[str, Any] = {
        "track_usage": track_usage,
        "track_links": track_links,
        "deallocate": deallocate,
        "detach_usage": detach_usage,
    }

    def segment(begin: int, end: int, *fields: Tensor) -> tuple[Tensor, ...]:
        now, reads = MemoryState(*fields), []
        for t in range(begin, end):
            said = MemoryInterface(*(field[:, t] for field in interface))
            mask = None if step_mask is None else step_mask[:, t]
            exponent = sharpness[:, t] if isinstance(sharpness, Tensor) and sharpness.dim() == 3 else sharpness
            read, now = memory_step(now, said, sharpness=exponent, step_mask=mask, **options)
            reads.append(read)
        return torch.stack(reads, 1), *now

    # Neither functorch nor a compiler looks into the hooks of a checkpoint; there the whole graph is kept.
    plain = torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling()
    recompute = plain and torch.is_grad_enabled() and every < steps
    pieces = []
    for begin in range(0, steps, every):
        end = min(begin + every, steps)
        if recompute:
            read, *fields = checkpoint(segment, begin, end, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            read, *fields = segment(begin, end, *state)
        state = MemoryState(*fields)
        pieces.append(read)
    if not pieces:
        batch, _, heads, width = interface.read_keys.shape
        return interface.read_keys.new_zeros((batch, 0, heads, width)), state
    return torch.cat(pieces, 1), state


def default_checkpoint_every(steps: int) -> int:
    """ceil(sqrt(T)): as many snapshots of the link matrices as a segment recomputes."""
    every = 1
    # By comparisons alone, which a compiler can take as guards on a symbolic number of steps.
    while every * every < steps:
        every += 1
    return every
