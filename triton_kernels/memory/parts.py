"""The parts of a step, each as an operator of its own: one launch each way, two for the gradients that cross blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import LAUNCH, on_device
from . import backward, forward
from ._device import NORM_EPS, TINY, USAGE_EPS, key_factors, logs_before, retention, sharpened, softmax, written
from .backward import _others, _unit_bwd, _unit_factors, allocation_slopes, optional, precedence_bwd
from .forward import EXACT, lookup, partial_sum, tiles, warps


@triton.jit
def _content_fwd(
    memory, keys, strengths, slot_mask, weights, N, W,
    H: tl.constexpr, HB: tl.constexpr, HAS_MASK: tl.constexpr,
    NB: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    factors = key_factors(keys, strengths, b, W, H, HB, WB)
    lookup(memory, keys, factors, weights, memory, memory, b, N, W, H, HB, 1, False, BN, BW)
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    taking_part = ok
    if HAS_MASK:
        taking_part = ok & (tl.load(slot_mask + b * N + n, mask=ok, other=0) != 0)
    for h in tl.static_range(H):
        at = (b * H + h) * N + n
        found = softmax(tl.load(weights + at, mask=ok, other=0.0), taking_part)
        tl.debug_barrier()
        tl.store(weights + at, found, mask=ok)


@triton.jit
def _content_bwd(
    grad, memory, keys, strengths, slot_mask, weights, d_memory, d_keys, d_strengths, cosine, inverse, projection, N, W,
    H: tl.constexpr, HB: tl.constexpr, HAS_MASK: tl.constexpr,
    NB: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    units = _unit_factors(keys, b, W, H, HB, WB)
    for first in range(0, N, BN):
        rows = first + tl.arange(0, BN)
        row_ok = rows < N
        if HAS_MASK:
            row_ok = row_ok & (tl.load(slot_mask + b * N + rows, mask=rows < N, other=0) != 0)
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, HB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            m = tl.load(
                memory + (b * N + rows)[:, None] * W + w[None, :], mask=row_ok[:, None] & (w < W)[None, :], other=0.0
            )
            squares += tl.sum(m * m, axis=1)
            for h in tl.static_range(H):
                k = tl.load(keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                dots += tl.where((heads == h)[None, :], tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(squares + NORM_EPS)
        lane = (b * H + heads)[None, :] * N + rows[:, None]
        tl.store(inverse + b * N + rows, scale, mask=rows < N)
        tl.store(cosine + lane, dots * units[None, :] * scale[:, None], mask=(rows < N)[:, None] & (heads < H)[None, :])
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    along = tl.zeros((NB,), tl.float32)
    for h in tl.static_range(H):
        at = (b * H + h) * N + n
        found = tl.load(weights + at, mask=ok, other=0.0)
        slope = tl.load(grad + at, mask=ok, other=0.0)
        d_score = found * (slope - tl.sum(found * slope, axis=0))
        cos = tl.load(cosine + at, mask=ok, other=0.0)
        tl.store(d_strengths + b * H + h, tl.sum(d_score * (cos - tl.sum(found * cos, axis=0)), axis=0))
        d_cos = d_score * tl.load(strengths + b * H + h)
        along += d_cos * cos
        tl.debug_barrier()
        tl.store(cosine + at, d_cos, mask=ok)
    tl.store(projection + b * N + n, along, mask=ok)
    tl.debug_barrier()
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        d_k = tl.zeros((HB, BW), tl.float32)
        for first in range(0, N, BN):
            rows = first + tl.arange(0, BN)
            inside = (rows < N)[:, None] & (w < W)[None, :]
            part = inside
            if HAS_MASK:
                part = inside & (tl.load(slot_mask + b * N + rows, mask=rows < N, other=0) != 0)[:, None]
            cell = (b * N + rows)[:, None] * W + w[None, :]
            scale = tl.load(inverse + b * N + rows, mask=rows < N, other=0.0)
            unit = tl.load(memory + cell, mask=part, other=0.0) * scale[:, None]
            d_unit = -unit * tl.load(projection + b * N + rows, mask=rows < N, other=0.0)[:, None]
            for h in tl.static_range(H):
                d_c = tl.load(cosine + (b * H + h) * N + rows, mask=rows < N, other=0.0)
                k = tl.load(keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                k = k * tl.sum(tl.where(heads == h, units, 0.0), axis=0)
                d_unit += d_c[:, None] * k[None, :]
                d_k += tl.where((heads == h)[:, None], tl.sum(d_c[:, None] * unit, axis=0)[None, :], 0.0)
            tl.store(d_memory + cell, tl.where(part, d_unit * scale[:, None], 0.0), mask=inside)
        tl.store(d_keys + (b * H + heads)[:, None] * W + w[None, :], d_k, mask=(heads < H)[:, None] & (w < W)[None, :])
    tl.debug_barrier()
    _unit_bwd(keys, d_keys, b, W, H, HB, WB)


def content_weights_fwd(memory: Tensor, keys: Tensor, strengths: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Launcher of ``memkern::content_weights_fwd``."""
    memory, keys, strengths = memory.contiguous(), keys.contiguous(), strengths.contiguous()
    (batch, slots, width), heads = memory.shape, keys.shape[1]
    weights = torch.empty((batch, heads, slots), dtype=torch.float32, device=memory.device)
    mask = memory if slot_mask is None else slot_mask.contiguous()
    with on_device(memory):
        _content_fwd[(batch,)](
            memory, keys, strengths, mask, weights, slots, width, H=heads, HB=triton.next_power_of_2(heads),
            HAS_MASK=slot_mask is not None, **tiles(slots, width), num_warps=warps(slots), **LAUNCH,
        )  # fmt: skip
    return weights


def content_weights_bwd(
    grad: Tensor, memory: Tensor, keys: Tensor, strengths: Tensor, slot_mask: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::content_weights_bwd``."""
    grad, weights = grad.contiguous(), weights.contiguous()
    memory, keys, strengths = memory.contiguous(), keys.contiguous(), strengths.contiguous()
    (batch, slots, width), heads = memory.shape, keys.shape[1]
    d_memory, d_keys, d_strengths = torch.empty_like(memory), torch.empty_like(keys), torch.empty_like(strengths)
    cosine, rows = torch.empty_like(weights), torch.empty((2, batch, slots), dtype=torch.float32, device=memory.device)
    mask = memory if slot_mask is None else slot_mask.contiguous()
    with on_device(memory):
        _content_bwd[(batch,)](
            grad, memory, keys, strengths, mask, weights, d_memory, d_keys, d_strengths, cosine, rows[0], rows[1],
            slots, width, H=heads, HB=triton.next_power_of_2(heads), HAS_MASK=slot_mask is not None,
            **tiles(slots, width), num_warps=warps(slots), **LAUNCH,
        )  # fmt: skip
    return d_memory, d_keys, d_strengths


@triton.jit
def _sharpen_fwd(weights, gamma, out, N, NB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    w = tl.load(weights + row * N + n, mask=ok, other=0.0)
    tl.store(out + row * N + n, sharpened(w, tl.load(gamma + row), ok), mask=ok)


@triton.jit
def _sharpen_bwd(grad, weights, gamma, out, d_weights, d_gamma, N, NB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    at = row * N + n
    w, after = tl.load(weights + at, mask=ok, other=0.0), tl.load(out + at, mask=ok, other=0.0)
    slope = tl.load(grad + at, mask=ok, other=0.0)
    positive = ok & (w >= TINY)
    safe = tl.where(positive, w, 1.0)
    d_logit = tl.where(positive, after * (slope - tl.sum(after * slope, axis=0)), 0.0)
    tl.store(d_gamma + row, tl.sum(d_logit * tl.log(safe), axis=0))
    tl.store(d_weights + at, d_logit * tl.load(gamma + row) / safe, mask=ok)


def sharpen_fwd(weights: Tensor, gamma: Tensor) -> Tensor:
    """Launcher of ``memkern::sharpen_fwd``, rows (M, N) with an exponent each."""
    weights, gamma = weights.contiguous(), gamma.contiguous()
    out, slots = torch.empty_like(weights), weights.shape[-1]
    with on_device(weights):
        _sharpen_fwd[(gamma.numel(),)](weights, gamma, out, slots, NB=triton.next_power_of_2(slots), **_row(slots))
    return out


def sharpen_bwd(grad: Tensor, weights: Tensor, gamma: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::sharpen_bwd``."""
    grad, weights, gamma, sharp = grad.contiguous(), weights.contiguous(), gamma.contiguous(), sharp.contiguous()
    d_weights, d_gamma, slots = torch.empty_like(weights), torch.empty_like(gamma), weights.shape[-1]
    with on_device(weights):
        _sharpen_bwd[(gamma.numel(),)](
            grad, weights, gamma, sharp, d_weights, d_gamma, slots, NB=triton.next_power_of_2(slots), **_row(slots)
        )
    return d_weights, d_gamma


def _row(slots: int) -> dict[str, Any]:
    return {"num_warps": warps(slots), **LAUNCH}


@triton.jit
def _allocation_fwd(usage, scratch, out, N, NB: tl.constexpr, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    used = tl.load(usage + b * N + n, mask=ok, other=0.0)
    entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
    tl.store(scratch + b * N + n, entered, mask=ok)
    tl.debug_barrier()
    free = (1.0 - used) * (1.0 - USAGE_EPS) * tl.exp(logs_before(scratch + b * N, entered, n, N, NB, BJ))
    tl.store(out + b * N + n, free, mask=ok)


@triton.jit
def _allocation_bwd(grad, usage, scratch, mass, d_usage, N, NB: tl.constexpr, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    used = tl.load(usage + b * N + n, mask=ok, other=0.0)
    slope = tl.load(grad + b * N + n, mask=ok, other=0.0)
    entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
    tl.store(scratch + b * N + n, entered, mask=ok)
    tl.debug_barrier()
    reach = tl.exp(logs_before(scratch + b * N, entered, n, N, NB, BJ))
    tl.store(mass + b * N + n, (1.0 - used) * (1.0 - USAGE_EPS) * reach * slope, mask=ok)
    tl.debug_barrier()
    _, behind = allocation_slopes(scratch + b * N, mass + b * N, entered, n, N, NB, BJ)
    tl.store(d_usage + b * N + n, (behind / entered - reach * slope) * (1.0 - USAGE_EPS), mask=ok)


def _pairs(slots: int) -> dict[str, Any]:
    nb = triton.next_power_of_2(slots)
    return {"NB": nb, "BJ": max(1, min(32, 4096 // nb)), "num_warps": warps(slots), **EXACT}


def allocation_weights_fwd(usage: Tensor) -> Tensor:
    """Launcher of ``memkern::allocation_weights_fwd``."""
    usage = usage.contiguous()
    out, scratch = torch.empty_like(usage), torch.empty_like(usage)
    with on_device(usage):
        _allocation_fwd[(usage.shape[0],)](usage, scratch, out, usage.shape[1], **_pairs(usage.shape[1]))
    return out


def allocation_weights_bwd(grad: Tensor, usage: Tensor) -> Tensor:
    """Launcher of ``memkern::allocation_weights_bwd``."""
    grad, usage = grad.contiguous(), usage.contiguous()
    d_usage, scratch, mass = torch.empty_like(usage), torch.empty_like(usage), torch.empty_like(usage)
    with on_device(usage):
        _allocation_bwd[(usage.shape[0],)](
            grad, usage, scratch, mass, d_usage, usage.shape[1], **_pairs(usage.shape[1])
        )
    return d_usage


@triton.jit
def _usage_fwd(
    usage, write_weights, read_weights, free_gates, out, N, H: tl.constexpr, R: tl.constexpr, NB: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    u = tl.load(usage + b * N + n, mask=ok, other=0.0)
    used = u + written(write_weights, b, n, ok, N, H) * (1.0 - u)
    used = used * retention(read_weights, free_gates, b, n, ok, N, R)
    tl.store(out + b * N + n, tl.where(used > 1.0, 1.0, tl.where(used < 0.0, 0.0, used)), mask=ok)


@triton.jit
def _usage_bwd(
    grad, usage, write_weights, read_weights, free_gates, d_usage, d_write_weights, d_read_weights, d_free, N,
    H: tl.constexpr, R: tl.constexpr, DETACH: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    u = tl.load(usage + b * N + n, mask=ok, other=0.0)
    wrote = written(write_weights, b, n, ok, N, H)
    psi = retention(read_weights, free_gates, b, n, ok, N, R)
    total = u + wrote * (1.0 - u)
    raw = total * psi
    slope = tl.where((raw < 0.0) | (raw > 1.0), 0.0, tl.load(grad + b * N + n, mask=ok, other=0.0))
    tl.store(d_usage + b * N + n, slope * psi * (1.0 - wrote), mask=ok)
    for h in tl.static_range(H):
        d_w = slope * psi * (1.0 - u)
        if DETACH:
            d_w = tl.zeros((NB,), tl.float32)
        for o in tl.static_range(H):
            if o != h:
                d_w = d_w * (1.0 - tl.load(write_weights + (b * H + o) * N + n, mask=ok, other=0.0))
        tl.store(d_write_weights + (b * H + h) * N + n, d_w, mask=ok)
    for r in tl.static_range(R):
        d_psi = slope * total
        for o in tl.static_range(R):
            if o != r:
                weight = tl.load(read_weights + (b * R + o) * N + n, mask=ok, other=0.0)
                d_psi = d_psi * (1.0 - tl.load(free_gates + b * R + o) * weight)
        at = (b * R + r) * N + n
        tl.store(d_free + b * R + r, -tl.sum(d_psi * tl.load(read_weights + at, mask=ok, other=0.0), axis=0))
        tl.store(d_read_weights + at, -d_psi * tl.load(free_gates + b * R + r), mask=ok)


def update_usage_fwd(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> Tensor:
    """Launcher of ``memkern::update_usage_fwd``."""
    given = [x.contiguous() for x in (usage, write_weights, read_weights, free_gates)]
    out, (batch, slots) = torch.empty_like(given[0]), usage.shape
    with on_device(usage):
        _usage_fwd[(batch,)](
            *given, out, slots, H=write_weights.shape[1], R=read_weights.shape[1], NB=triton.next_power_of_2(slots),
            **_row(slots),
        )  # fmt: skip
    return out


def update_usage_bwd(
    grad: Tensor, usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor, detach_write: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::update_usage_bwd``."""
    given = [x.contiguous() for x in (usage, write_weights, read_weights, free_gates)]
    made, (batch, slots) = [torch.empty_like(x) for x in given], usage.shape
    with on_device(usage):
        _usage_bwd[(batch,)](
            grad.contiguous(), *given, *made, slots, H=write_weights.shape[1], R=read_weights.shape[1],
            DETACH=detach_write, NB=triton.next_power_of_2(slots), **_row(slots),
        )  # fmt: skip
    return made[0], made[1], made[2], made[3]


def update_links_fwd(links: Tensor, precedence: Tensor, write_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::update_links_fwd``: one pass over the links."""
    links, precedence, write_weights = links.contiguous(), precedence.contiguous(), write_weights.contiguous()
    new_links, new_precedence = torch.empty_like(links), torch.empty_like(precedence)
    with on_device(links):
        forward.update_links(links, precedence, write_weights, None, None, new_links, new_precedence)
    return new_links, new_precedence


@triton.jit
def _precedence_bwd(
    grad, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, d_write_weights, N, blocks,
    HAS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    slope = precedence_bwd(
        grad, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, plane, blocks, n, ok, N, HAS
    )
    tl.store(d_write_weights + plane * N + n, slope, mask=ok)


def update_links_bwd(
    d_links: Tensor | None,
    d_precedence: Tensor | None,
    links: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::update_links_bwd``: one pass over the links and their gradient, and one over its sums."""
    links, precedence, write_weights = links.contiguous(), precedence.contiguous(), write_weights.contiguous()
    d_links = None if d_links is None else d_links.contiguous()
    d_precedence = None if d_precedence is None else d_precedence.contiguous()
    batch, heads, slots = precedence.shape
    made, d_weights = torch.empty_like(precedence), torch.empty_like(write_weights)
    with on_device(links):
        d_old, _, _, d_rows, d_columns, d_before, blocks = backward.links_bwd(
            d_links, links, precedence, write_weights, None, None, None, None
        )
        _precedence_bwd[(batch * heads,)](
            precedence if d_precedence is None else d_precedence, precedence, write_weights, d_rows, d_columns,
            d_before, made, d_weights, slots, blocks, HAS=d_precedence is not None, NB=triton.next_power_of_2(slots),
            **_row(slots),
        )  # fmt: skip
    return d_old, made, d_weights


@triton.jit
def _add_blocks(partials, out, N, blocks, R: tl.constexpr, NB: tl.constexpr):
    """(planes, blocks, R, N) -> (planes, R, N)."""
    plane = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    for r in tl.static_range(R):
        tl.store(out + (plane * R + r) * N + n, partial_sum(partials, plane, blocks, r, n, ok, N, R), mask=ok)


def directional_weights_fwd(links: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::directional_weights_fwd``: one pass over the links, and the sum of its blocks."""
    links, read_weights = links.contiguous(), read_weights.contiguous()
    (batch, heads, slots, _), read_heads = links.shape, read_weights.shape[1]
    with on_device(links):
        ahead, partials, blocks = forward.multiply_links(links, read_weights)
        back = torch.empty_like(ahead)
        _add_blocks[(batch * heads,)](
            partials, back, slots, blocks, R=read_heads, NB=triton.next_power_of_2(slots), **_row(slots)
        )
    return ahead, back


@triton.jit
def _directional_bwd(
    d_ahead, d_back, links, read_weights, d_links, x, y, N,
    H: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, HAS_AHEAD: tl.constexpr, HAS_BACK: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """d_links = d_ahead r^T + r d_back^T; x = L d_back along rows, y = L^T d_ahead along columns, in blocks."""
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = plane // H
    i = block * BI + tl.arange(0, BI)
    row_ok = i < N
    r = tl.arange(0, RB)
    row_lanes = row_ok[:, None] & (r < R)[None, :]
    ahead_i = optional(d_ahead, (plane * R + r)[None, :] * N + i[:, None], row_lanes, HAS_AHEAD)
    across = tl.zeros((BI, RB), tl.float32)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        column_ok = j < N
        ok = row_ok[:, None] & column_ok[None, :]
        lanes = column_ok[:, None] & (r < R)[None, :]
        at = plane * N * N + i.to(tl.int64)[:, None] * N + j[None, :]
        link = tl.load(links + at, mask=ok, other=0.0)
        back_j = optional(d_back, (plane * R + r)[None, :] * N + j[:, None], lanes, HAS_BACK)
        across += tl.sum(link[:, :, None] * back_j[None, :, :], axis=1)
        to = ((plane * tl.num_programs(0) + block) * R + r)[None, :] * N + j[:, None]
        tl.store(y + to, tl.sum(link[:, :, None] * ahead_i[:, None, :], axis=0), mask=lanes)
        slope = tl.zeros((BI, BJ), tl.float32)
        for k in tl.static_range(R):
            read = read_weights + (b * R + k) * N
            line = (plane * R + k) * N
            r_i = tl.load(read + i, mask=row_ok, other=0.0)
            r_j = tl.load(read + j, mask=column_ok, other=0.0)
            slope += optional(d_ahead, line + i, row_ok, HAS_AHEAD)[:, None] * r_j[None, :]
            slope += r_i[:, None] * optional(d_back, line + j, column_ok, HAS_BACK)[None, :]
        tl.store(d_links + at, slope, mask=ok)
    tl.store(x + (plane * R + r)[None, :] * N + i[:, None], across, mask=row_lanes)


@triton.jit
def _directional_reads_bwd(x, y, d_read_weights, N, blocks, H: tl.constexpr, R: tl.constexpr, NB: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    for r in tl.static_range(R):
        total = tl.zeros((NB,), tl.float32)
        for h in tl.static_range(H):
            plane = b * H + h
            total += tl.load(x + (plane * R + r) * N + n, mask=ok, other=0.0)
            total += partial_sum(y, plane, blocks, r, n, ok, N, R)
        tl.store(d_read_weights + (b * R + r) * N + n, total, mask=ok)


def directional_weights_bwd(
    d_forward: Tensor | None, d_backward: Tensor | None, links: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::directional_weights_bwd``."""
    links, read_weights = links.contiguous(), read_weights.contiguous()
    ahead = None if d_forward is None else d_forward.contiguous()
    back = None if d_backward is None else d_backward.contiguous()
    (batch, heads, slots, _), read_heads = links.shape, read_weights.shape[1]
    block_i, block_j = forward.link_tiles(slots, 2 * read_heads)
    blocks = triton.cdiv(slots, block_i)
    d_links, d_read = torch.empty_like(links), torch.empty_like(read_weights)
    x = torch.empty((batch, heads, read_heads, slots), dtype=torch.float32, device=links.device)
    y = torch.empty((batch, heads, blocks, read_heads, slots), dtype=torch.float32, device=links.device)
    with on_device(links):
        _directional_bwd[(blocks, batch * heads)](
            links if ahead is None else ahead, links if back is None else back, links, read_weights, d_links, x, y,
            slots, H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), HAS_AHEAD=ahead is not None,
            HAS_BACK=back is not None, BI=block_i, BJ=block_j, num_warps=4, **LAUNCH,
        )  # fmt: skip
        _directional_reads_bwd[(batch,)](
            x, y, d_read, slots, blocks, H=heads, R=read_heads, NB=triton.next_power_of_2(slots), **_row(slots)
        )
    return d_links, d_read


@triton.jit
def _read_fwd(memory, weights, reads, N, W, R: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    total = tl.zeros((RB, BW), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        m = tl.load(memory + (b * N + n)[:, None] * W + w[None, :], mask=ok[:, None] & (w < W)[None, :], other=0.0)
        for i in tl.static_range(R):
            part = tl.load(weights + (b * R + i) * N + n, mask=ok, other=0.0)
            total += tl.where((r == i)[:, None], tl.sum(part[:, None] * m, axis=0)[None, :], 0.0)
    tl.store(reads + (b * R + r)[:, None] * W + w[None, :], total, mask=(r < R)[:, None] & (w < W)[None, :])


@triton.jit
def _read_part_bwd(
    grad, memory, weights, d_memory, d_weights, N, W,
    R: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < N
    slopes = tl.zeros((BN, RB), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m = tl.load(memory + cell, mask=inside, other=0.0)
        d_m = tl.zeros((BN, BW), tl.float32)
        for i in tl.static_range(R):
            g = tl.load(grad + (b * R + i) * W + w, mask=w < W, other=0.0)
            part = tl.load(weights + (b * R + i) * N + n, mask=ok, other=0.0)
            slopes += tl.where((r == i)[None, :], tl.sum(m * g[None, :], axis=1)[:, None], 0.0)
            d_m += part[:, None] * g[None, :]
        tl.store(d_memory + cell, d_m, mask=inside)
    tl.store(d_weights + (b * R + r)[None, :] * N + n[:, None], slopes, mask=ok[:, None] & (r < R)[None, :])


def read_memory_fwd(memory: Tensor, weights: Tensor) -> Tensor:
    """Launcher of ``memkern::read_memory_fwd``."""
    memory, weights = memory.contiguous(), weights.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    reads = torch.empty((batch, heads, width), dtype=torch.float32, device=memory.device)
    tile = tiles(slots, width)
    with on_device(memory):
        _read_fwd[(batch, triton.cdiv(width, tile["BW"]))](
            memory, weights, reads, slots, width, R=heads, RB=triton.next_power_of_2(heads), BN=tile["BN"],
            BW=tile["BW"], num_warps=4, **LAUNCH,
        )  # fmt: skip
    return reads


def read_memory_bwd(grad: Tensor, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::read_memory_bwd``."""
    grad, memory, weights = grad.contiguous(), memory.contiguous(), weights.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    d_memory, d_weights, tile = torch.empty_like(memory), torch.empty_like(weights), tiles(slots, width)
    with on_device(memory):
        _read_part_bwd[(batch, triton.cdiv(slots, tile["BN"]))](
            grad, memory, weights, d_memory, d_weights, slots, width, R=heads, RB=triton.next_power_of_2(heads),
            BN=tile["BN"], BW=tile["BW"], num_warps=4, **LAUNCH,
        )  # fmt: skip
    return d_memory, d_weights


@triton.jit
def _write_weights_bwd(
    grad, memory, weights, erase, add, d_memory, d_weights, N, W,
    H: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < N
    slopes = tl.zeros((BN, HB), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m, g = tl.load(memory + cell, mask=inside, other=0.0), tl.load(grad + cell, mask=inside, other=0.0)
        for h in tl.static_range(H):
            e = tl.load(erase + (b * H + h) * W + w, mask=w < W, other=0.0)
            v = tl.load(add + (b * H + h) * W + w, mask=w < W, other=0.0)
            rest = _others(weights, erase, b, h, n, ok, w, N, W, H, BN, BW)
            slope = tl.sum(g * (v[None, :] - m * rest * e[None, :]), axis=1)
            slopes += tl.where((heads == h)[None, :], slope[:, None], 0.0)
        tl.store(d_memory + cell, g * _others(weights, erase, b, H, n, ok, w, N, W, H, BN, BW), mask=inside)
    tl.store(d_weights + (b * H + heads)[None, :] * N + n[:, None], slopes, mask=ok[:, None] & (heads < H)[None, :])


@triton.jit
def _write_vectors_bwd(
    grad, memory, weights, erase, d_erase, d_add, N, W,
    H: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    d_e = tl.zeros((HB, BW), tl.float32)
    d_v = tl.zeros((HB, BW), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m, g = tl.load(memory + cell, mask=inside, other=0.0), tl.load(grad + cell, mask=inside, other=0.0)
        for h in tl.static_range(H):
            here = (heads == h)[:, None]
            weight = tl.load(weights + (b * H + h) * N + n, mask=ok, other=0.0)
            rest = _others(weights, erase, b, h, n, ok, w, N, W, H, BN, BW)
            d_e -= tl.where(here, tl.sum(g * m * rest * weight[:, None], axis=0)[None, :], 0.0)
            d_v += tl.where(here, tl.sum(g * weight[:, None], axis=0)[None, :], 0.0)
    to, to_ok = (b * H + heads)[:, None] * W + w[None, :], (heads < H)[:, None] & (w < W)[None, :]
    tl.store(d_erase + to, d_e, mask=to_ok)
    tl.store(d_add + to, d_v, mask=to_ok)


def write_memory_fwd(memory: Tensor, weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor) -> Tensor:
    """Launcher of ``memkern::write_memory_fwd``."""
    memory, weights = memory.contiguous(), weights.contiguous()
    said = {"erase_vectors": erase_vectors.contiguous(), "write_vectors": write_vectors.contiguous()}
    new = torch.empty_like(memory)
    with on_device(memory):
        forward.write_memory(memory, weights, weights, said | {"free_gates": memory}, None, False, new)
    return new


def write_memory_bwd(
    grad: Tensor, memory: Tensor, weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::write_memory_bwd``: gradients along the slots, and along the columns."""
    grad, memory, weights = grad.contiguous(), memory.contiguous(), weights.contiguous()
    erase, add = erase_vectors.contiguous(), write_vectors.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    d_memory, d_weights = torch.empty_like(memory), torch.empty_like(weights)
    d_erase, d_add = torch.empty_like(erase), torch.empty_like(add)
    tile = tiles(slots, width)
    block = {"H": heads, "HB": triton.next_power_of_2(heads), "BN": tile["BN"], "BW": tile["BW"], "num_warps": 4}
    with on_device(memory):
        _write_weights_bwd[(batch, triton.cdiv(slots, tile["BN"]))](
            grad, memory, weights, erase, add, d_memory, d_weights, slots, width, **block, **LAUNCH
        )
        _write_vectors_bwd[(batch, triton.cdiv(width, tile["BW"]))](
            grad, memory, weights, erase, d_erase, d_add, slots, width, **block, **LAUNCH
        )
    return d_memory, d_weights, d_erase, d_add
