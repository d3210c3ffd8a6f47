"""One step of the memory, backward: three launches, and one pass over the links and their gradient.

The first goes back through reading: sharpening, mix, read lookup. The second goes over the links. With dw the gradient
of the mixed read weights and r the previous read weights, x = L dw and y = L^T dw give the gradients of modes and of r
without the directional weights themselves: <r, y> and <r, x>, pi_f y + pi_b x. The third goes back through the write:
erase and add, write weights, allocation, usage. A masked batch item passes its state's gradients on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import LAUNCH, on_device
from ._device import NORM_EPS, TINY, USAGE_EPS, retention, written
from .forward import EXACT, link_tiles, partial_sum, tiles, warps


@triton.jit
def optional(pointer, at, mask, HAS: tl.constexpr):
    """What stands there, or zeros where there is no tensor."""
    if HAS:
        x = tl.load(pointer + at, mask=mask, other=0.0)
    else:
        x = tl.where(mask, 0.0, 0.0)
    return x


@triton.jit
def _unit_factors(keys, b, W, H: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """1 / |key| of each head."""
    h, w = tl.arange(0, HB), tl.arange(0, WB)
    k = tl.load(keys + (b * H + h)[:, None] * W + w[None, :], mask=(h < H)[:, None] & (w < W)[None, :], other=0.0)
    return 1.0 / tl.sqrt(tl.sum(k * k, axis=1) + NORM_EPS)


@triton.jit
def _unit_bwd(keys, d_keys, b, W, H: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """The gradients of unit keys, in place those of the keys."""
    h, w = tl.arange(0, HB), tl.arange(0, WB)
    at, ok = (b * H + h)[:, None] * W + w[None, :], (h < H)[:, None] & (w < W)[None, :]
    k, d_unit = tl.load(keys + at, mask=ok, other=0.0), tl.load(d_keys + at, mask=ok, other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(k * k, axis=1) + NORM_EPS)
    unit = k * factor[:, None]
    along = tl.sum(unit * d_unit, axis=1)
    across = d_unit - unit * along[:, None]
    # What rounding left along the key: exactly, unit . across = along (1 - |unit|^2) = along eps / (|k|^2 + eps).
    left = tl.sum(unit * across, axis=1) - along * (NORM_EPS * factor * factor)
    tl.debug_barrier()
    tl.store(d_keys + at, factor[:, None] * (across - unit * left[:, None]), mask=ok)


@triton.jit
def _read_bwd(
    d_reads, d_read_weights, d_new_memory, memory, read_weights, content, mixed, keys, strengths, modes, sharpness,
    step_mask, d_mixed, d_memory, d_keys, d_strengths, d_modes, d_sharpness, cosine, inverse, projection, N, W,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, TRACK_LINKS: tl.constexpr, SHARPEN: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_READS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MEMORY: tl.constexpr,
    NB: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``memory`` and ``read_weights`` are those after the step; ``d_memory`` becomes the gradient of that memory."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    columns = tl.arange(0, WB)
    if HAS_MASK:  # noqa: SIM102 - decided when the kernel is compiled, and without a mask there is none to load
        if tl.load(step_mask + b) == 0:
            for i in tl.static_range(R):
                tl.store(d_keys + (b * R + i) * W + columns, columns * 0.0, mask=columns < W)
                tl.store(d_strengths + b * R + i, 0.0)
                if SHARPEN:
                    tl.store(d_sharpness + b * R + i, 0.0)
            for i in tl.static_range(R * (1 + 2 * H)):
                tl.store(d_modes + b * R * (1 + 2 * H) + i, 0.0)
            return
    units = _unit_factors(keys, b, W, R, RB, WB)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, RB), tl.float32)
        slopes = tl.zeros((BN, RB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            m = tl.load(memory + (b * N + n)[:, None] * W + w[None, :], mask=ok[:, None] & (w < W)[None, :], other=0.0)
            squares += tl.sum(m * m, axis=1)
            for i in tl.static_range(R):
                k = tl.load(keys + (b * R + i) * W + w, mask=w < W, other=0.0)
                dots += tl.where((r == i)[None, :], tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
                g = optional(d_reads, (b * R + i) * W + w, w < W, HAS_READS)
                slopes += tl.where((r == i)[None, :], tl.sum(m * g[None, :], axis=1)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(squares + NORM_EPS)
        at = (b * R + r)[None, :] * N + n[:, None]
        inside = ok[:, None] & (r < R)[None, :]
        tl.store(inverse + b * N + n, scale, mask=ok)
        tl.store(cosine + at, dots * units[None, :] * scale[:, None], mask=inside)
        tl.store(d_mixed + at, slopes, mask=inside)
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    along = tl.zeros((NB,), tl.float32)
    for i in tl.static_range(R):
        at = (b * R + i) * N + n
        slope = tl.load(d_mixed + at, mask=ok, other=0.0) + optional(d_read_weights, at, ok, HAS_WEIGHTS)
        if SHARPEN:
            before = tl.load(mixed + at, mask=ok, other=0.0)
            after = tl.load(read_weights + at, mask=ok, other=0.0)
            gamma = tl.load(sharpness + b * R + i)
            positive = ok & (before >= TINY)
            safe = tl.where(positive, before, 1.0)
            d_logit = tl.where(positive, after * (slope - tl.sum(after * slope, axis=0)), 0.0)
            tl.store(d_sharpness + b * R + i, tl.sum(d_logit * tl.log(safe), axis=0))
            slope = d_logit * gamma / safe
        tl.debug_barrier()
        tl.store(d_mixed + at, slope, mask=ok)
        found = tl.load(content + at, mask=ok, other=0.0)
        share = tl.load(modes + (b * R + i) * (1 + 2 * H) + H)
        if TRACK_LINKS:
            tl.store(d_modes + (b * R + i) * (1 + 2 * H) + H, tl.sum(slope * found, axis=0))
        else:
            share = tl.where(share == 0.0, 0.0, 1.0)
            for mode in tl.static_range(1 + 2 * H):
                tl.store(d_modes + (b * R + i) * (1 + 2 * H) + mode, 0.0)
        d_found = share * slope
        d_score = found * (d_found - tl.sum(found * d_found, axis=0))
        cos = tl.load(cosine + at, mask=ok, other=0.0)
        # A covariance: d_score sums to zero, so the mean costs nothing and saves digits where cosines are alike.
        tl.store(d_strengths + b * R + i, tl.sum(d_score * (cos - tl.sum(found * cos, axis=0)), axis=0))
        d_cos = d_score * tl.load(strengths + b * R + i)
        along += d_cos * cos
        # A lane may be held by several threads, and none may read what another has replaced.
        tl.debug_barrier()
        tl.store(cosine + at, d_cos, mask=ok)
    tl.store(projection + b * N + n, along, mask=ok)
    tl.debug_barrier()
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        d_k = tl.zeros((RB, BW), tl.float32)
        for first in range(0, N, BN):
            rows = first + tl.arange(0, BN)
            row_ok = rows < N
            inside = row_ok[:, None] & (w < W)[None, :]
            cell = (b * N + rows)[:, None] * W + w[None, :]
            scale = tl.load(inverse + b * N + rows, mask=row_ok, other=0.0)
            unit = tl.load(memory + cell, mask=inside, other=0.0) * scale[:, None]
            d_unit = -unit * tl.load(projection + b * N + rows, mask=row_ok, other=0.0)[:, None]
            d_m = optional(d_new_memory, cell, inside, HAS_MEMORY)
            for i in tl.static_range(R):
                d_c = tl.load(cosine + (b * R + i) * N + rows, mask=row_ok, other=0.0)
                k = tl.load(keys + (b * R + i) * W + w, mask=w < W, other=0.0)
                k = k * tl.sum(tl.where(r == i, units, 0.0), axis=0)
                d_unit += d_c[:, None] * k[None, :]
                d_k += tl.where((r == i)[:, None], tl.sum(d_c[:, None] * unit, axis=0)[None, :], 0.0)
                if HAS_READS:
                    weight = tl.load(read_weights + (b * R + i) * N + rows, mask=row_ok, other=0.0)
                    g = tl.load(d_reads + (b * R + i) * W + w, mask=w < W, other=0.0)
                    d_m += weight[:, None] * g[None, :]
            tl.store(d_memory + cell, d_m + d_unit * scale[:, None], mask=inside)
        tl.store(d_keys + (b * R + r)[:, None] * W + w[None, :], d_k, mask=(r < R)[:, None] & (w < W)[None, :])
    tl.debug_barrier()
    _unit_bwd(keys, d_keys, b, W, R, RB, WB)


@triton.jit
def _links_bwd(
    d_new_links, links, precedence, write_weights, read_weights, d_mixed, modes, step_mask,
    d_links, x, y, d_rows, d_columns, d_before, N,
    H: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, HAS_LINKS: tl.constexpr, READ: tl.constexpr,
    HAS_MASK: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head. ``write_weights`` are the new ones, ``read_weights`` the previous.

    ``x`` (B, H, R, N) and ``d_rows`` (B, H, N) are sums along rows; ``y`` (B, H, blocks, R, N), ``d_columns`` and
    ``d_before`` (B, H, blocks, N) partials of sums along columns.
    """
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = plane // H, plane % H
    live = tl.full((), 1, tl.int1)
    if HAS_MASK:
        live = tl.load(step_mask + b) != 0
    i = block * BI + tl.arange(0, BI)
    row_ok = i < N
    r = tl.arange(0, RB)
    w_i = tl.load(write_weights + plane * N + i, mask=row_ok, other=0.0)
    along_rows = tl.zeros((BI,), tl.float32)
    across = tl.zeros((BI, RB), tl.float32)
    slope_i = tl.zeros((BI, RB), tl.float32)
    if READ:
        slope_i = tl.load(
            d_mixed + (b * R + r)[None, :] * N + i[:, None], mask=row_ok[:, None] & (r < R)[None, :], other=0.0
        )
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        column_ok = j < N
        ok = row_ok[:, None] & column_ok[None, :]
        at = plane * N * N + i.to(tl.int64)[:, None] * N + j[None, :]
        old = tl.load(links + at, mask=ok, other=0.0)
        given = optional(d_new_links, at, ok, HAS_LINKS)
        w_j = tl.load(write_weights + plane * N + j, mask=column_ok, other=0.0)
        p_j = tl.load(precedence + plane * N + j, mask=column_ok, other=0.0)
        off = i[:, None] != j[None, :]
        factor = 1.0 - w_i[:, None] - w_j[None, :]
        passes = off & ~(factor < 0.0)
        kept = tl.where(passes, factor, 0.0)
        d_new = given
        if READ:
            new = tl.where(off, kept * old + w_i[:, None] * p_j[None, :], 0.0)
            slope_j = tl.load(
                d_mixed + (b * R + r)[:, None] * N + j[None, :], mask=(r < R)[:, None] & column_ok[None, :], other=0.0
            )
            across += tl.sum(new[:, :, None] * tl.trans(slope_j)[None, :, :], axis=1)
            to = ((plane * tl.num_programs(0) + block) * R + r)[None, :] * N + j[:, None]
            tl.store(
                y + to,
                tl.sum(new[:, :, None] * slope_i[:, None, :], axis=0),
                mask=column_ok[:, None] & (r < R)[None, :],
            )
            for k in tl.static_range(R):
                mode = modes + (b * R + k) * (1 + 2 * H)
                rows, columns = d_mixed + (b * R + k) * N, read_weights + (b * R + k) * N
                s_i = tl.load(rows + i, mask=row_ok, other=0.0)
                s_j = tl.load(rows + j, mask=column_ok, other=0.0)
                r_i = tl.load(columns + i, mask=row_ok, other=0.0)
                r_j = tl.load(columns + j, mask=column_ok, other=0.0)
                ahead, back = tl.load(mode + H + 1 + h), tl.load(mode + h)
                d_new += (ahead * s_i)[:, None] * r_j[None, :] + (back * r_i)[:, None] * s_j[None, :]
        d_new = tl.where(off, d_new, 0.0)
        tl.store(d_links + at, tl.where(live, kept * d_new, given), mask=ok)
        lost = tl.where(passes, old * d_new, 0.0)
        along_rows += tl.sum(p_j[None, :] * d_new - lost, axis=1)
        to = (plane * tl.num_programs(0) + block) * N + j
        tl.store(d_columns + to, -tl.sum(lost, axis=0), mask=column_ok)
        tl.store(d_before + to, tl.sum(w_i[:, None] * d_new, axis=0), mask=column_ok)
    tl.store(d_rows + plane * N + i, along_rows, mask=row_ok)
    if READ:
        tl.store(x + (plane * R + r)[None, :] * N + i[:, None], across, mask=row_ok[:, None] & (r < R)[None, :])


@triton.jit
def precedence_bwd(
    d_new_precedence, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, plane, blocks, n, ok, N,
    HAS: tl.constexpr,
):  # fmt: skip
    """Gradient of the previous precedence, stored; of the new write weights through links and precedence, returned."""
    at = plane * N + n
    slope = tl.load(d_rows + at, mask=ok, other=0.0) + partial_sum(d_columns, plane, blocks, 0, n, ok, N, 1)
    d_p = partial_sum(d_before, plane, blocks, 0, n, ok, N, 1)
    if HAS:
        g = tl.load(d_new_precedence + at, mask=ok, other=0.0)
        total = tl.sum(tl.load(write_weights + at, mask=ok, other=0.0), axis=0)
        passes = ~(total > 1.0)
        d_p += tl.where(passes, 1.0 - total, 0.0) * g
        p = tl.load(precedence + at, mask=ok, other=0.0)
        slope += g - tl.where(passes, tl.sum(g * p, axis=0), 0.0)
    tl.store(d_precedence + at, d_p, mask=ok)
    return slope


@triton.jit
def _others(weights, erase, b, h: tl.constexpr, n, ok, w, N, W, H: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """prod of 1 - w_g e_g^T over the heads g other than ``h``."""
    product = tl.zeros((BN, BW), tl.float32) + 1.0
    for g in tl.static_range(H):
        if g != h:
            weight = tl.load(weights + (b * H + g) * N + n, mask=ok, other=0.0)
            e = tl.load(erase + (b * H + g) * W + w, mask=w < W, other=0.0)
            product = product * (1.0 - weight[:, None] * e[None, :])
    return product


@triton.jit
def allocation_slopes(entered_pointer, mass_pointer, entered, n, N, NB: tl.constexpr, BJ: tl.constexpr):
    """For each slot: sum of log entered_j over the slots before it, and of mass_j over those behind it."""
    before = tl.zeros((NB,), tl.float32)
    behind = tl.zeros((NB,), tl.float32)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        other = tl.load(entered_pointer + j, mask=j < N, other=float("inf"))
        mass = tl.load(mass_pointer + j, mask=j < N, other=0.0)
        first = (other[None, :] < entered[:, None]) | ((other[None, :] == entered[:, None]) & (j[None, :] < n[:, None]))
        itself = j[None, :] == n[:, None]
        before += tl.sum(tl.where(first, tl.log(other)[None, :], 0.0), axis=1)
        behind += tl.sum(tl.where(first | itself, 0.0, mass[None, :]), axis=1)
    return before, behind


@triton.jit
def _pass_on(given, target, at, mask, HAS: tl.constexpr):
    tl.store(target + at, optional(given, at, mask, HAS), mask=mask)


@triton.jit
def _write_bwd(
    d_new_memory, d_new_usage, d_new_precedence, d_new_read_weights, d_new_write_weights,
    memory, usage, precedence, read_weights, write_weights, new_usage, new_write_weights, content, allocation,
    write_keys, write_strengths, modes, erase, add, free_gates, allocation_gates, write_gates, step_mask,
    x, y, d_rows, d_columns, d_before,
    d_memory, d_usage, d_precedence, d_read_weights, d_write_weights, d_modes, d_write_keys, d_write_strengths, d_add,
    d_erase, d_free, d_allocation_gates, d_write_gates,
    slopes, cosine, inverse, projection, scratch, mass, N, W, blocks,
    R: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, TRACK_USAGE: tl.constexpr, TRACK_LINKS: tl.constexpr,
    DEALLOCATE: tl.constexpr, DETACH: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_USAGE: tl.constexpr, HAS_PRECEDENCE: tl.constexpr, HAS_READ: tl.constexpr, HAS_WRITE: tl.constexpr,
    NB: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """``d_memory`` comes as the gradient of the new memory and becomes that of the old one."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    columns = tl.arange(0, WB)
    heads = tl.arange(0, HB)
    if HAS_MASK:  # noqa: SIM102 - decided when the kernel is compiled, and without a mask there is none to load
        if tl.load(step_mask + b) == 0:
            for first in range(0, N * W, BN * BW):
                at = first + tl.arange(0, BN * BW)
                _pass_on(d_new_memory, d_memory, b * N * W + at, at < N * W, HAS_MEMORY)
            if TRACK_USAGE:
                _pass_on(d_new_usage, d_usage, b * N + n, ok, HAS_USAGE)
            for h in tl.static_range(H):
                if TRACK_LINKS:
                    _pass_on(d_new_precedence, d_precedence, (b * H + h) * N + n, ok, HAS_PRECEDENCE)
                _pass_on(d_new_write_weights, d_write_weights, (b * H + h) * N + n, ok, HAS_WRITE)
                at = (b * H + h) * W + columns
                tl.store(d_write_keys + at, columns * 0.0, mask=columns < W)
                tl.store(d_add + at, columns * 0.0, mask=columns < W)
                tl.store(d_erase + at, columns * 0.0, mask=columns < W)
                tl.store(d_write_strengths + b * H + h, 0.0)
                tl.store(d_allocation_gates + b * H + h, 0.0)
                tl.store(d_write_gates + b * H + h, 0.0)
            for r in tl.static_range(R):
                _pass_on(d_new_read_weights, d_read_weights, (b * R + r) * N + n, ok, HAS_READ)
                tl.store(d_free + b * R + r, 0.0)
            return
    # Through links, precedence and directional reads.
    for h in tl.static_range(H):
        plane = b * H + h
        slope = optional(d_new_write_weights, plane * N + n, ok, HAS_WRITE)
        if TRACK_LINKS:
            slope += precedence_bwd(
                d_new_precedence, precedence, new_write_weights, d_rows, d_columns, d_before, d_precedence, plane,
                blocks, n, ok, N, HAS_PRECEDENCE,
            )  # fmt: skip
        tl.store(slopes + plane * N + n, slope, mask=ok)
    for r in tl.static_range(R):
        at = (b * R + r) * N + n
        d_r = tl.zeros((NB,), tl.float32)
        if TRACK_LINKS:
            read = tl.load(read_weights + at, mask=ok, other=0.0)
            mode = (b * R + r) * (1 + 2 * H)
            for h in tl.static_range(H):
                plane = b * H + h
                lines = tl.load(x + (plane * R + r) * N + n, mask=ok, other=0.0)
                cols = partial_sum(y, plane, blocks, r, n, ok, N, R)
                tl.store(d_modes + mode + h, tl.sum(read * lines, axis=0))
                tl.store(d_modes + mode + H + 1 + h, tl.sum(read * cols, axis=0))
                d_r += tl.load(modes + mode + H + 1 + h) * cols + tl.load(modes + mode + h) * lines
        tl.store(d_read_weights + at, d_r, mask=ok)
    tl.debug_barrier()
    # Through erase and add; the cosines of the write lookup on the way.
    units = _unit_factors(write_keys, b, W, H, HB, WB)
    for first in range(0, N, BN):
        rows = first + tl.arange(0, BN)
        row_ok = rows < N
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, HB), tl.float32)
        d_weights = tl.zeros((BN, HB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            inside = row_ok[:, None] & (w < W)[None, :]
            cell = (b * N + rows)[:, None] * W + w[None, :]
            m = tl.load(memory + cell, mask=inside, other=0.0)
            if DEALLOCATE:
                m = m * retention(read_weights, free_gates, b, rows, row_ok, N, R)[:, None]
            g = tl.load(d_memory + cell, mask=inside, other=0.0)
            squares += tl.sum(m * m, axis=1)
            for h in tl.static_range(H):
                k = tl.load(write_keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                e = tl.load(erase + (b * H + h) * W + w, mask=w < W, other=0.0)
                v = tl.load(add + (b * H + h) * W + w, mask=w < W, other=0.0)
                rest = _others(new_write_weights, erase, b, h, rows, row_ok, w, N, W, H, BN, BW)
                here = (heads == h)[None, :]
                dots += tl.where(here, tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
                d_weight = tl.sum(g * (v[None, :] - m * rest * e[None, :]), axis=1)
                d_weights += tl.where(here, d_weight[:, None], 0.0)
        scale = 1.0 / tl.sqrt(squares + NORM_EPS)
        lane = (b * H + heads)[None, :] * N + rows[:, None]
        lane_ok = row_ok[:, None] & (heads < H)[None, :]
        tl.store(inverse + b * N + rows, scale, mask=row_ok)
        tl.store(cosine + lane, dots * units[None, :] * scale[:, None], mask=lane_ok)
        d_weights += tl.load(slopes + lane, mask=lane_ok, other=0.0)
        tl.debug_barrier()
        tl.store(slopes + lane, d_weights, mask=lane_ok)
    tl.debug_barrier()
    # Through the write weights, the last head first: each allocates on what the ones before it have taken.
    d_used = tl.zeros((NB,), tl.float32)
    along = tl.zeros((NB,), tl.float32)
    for h in tl.static_range(H - 1, -1, -1):
        at = (b * H + h) * N + n
        slope = tl.load(slopes + at, mask=ok, other=0.0)
        found = tl.load(content + at, mask=ok, other=0.0)
        gate, towards_free = tl.load(write_gates + b * H + h), tl.load(allocation_gates + b * H + h)
        free = tl.where(ok, 1.0 / N, 0.0)
        if TRACK_USAGE:
            free = tl.load(allocation + at, mask=ok, other=0.0)
        for_free, for_found = tl.sum(slope * free, axis=0), tl.sum(slope * found, axis=0)
        d_gate = towards_free * for_free + (1.0 - towards_free) * for_found
        d_towards = gate * (for_free - for_found)
        if TRACK_USAGE:
            used = tl.load(new_usage + b * N + n, mask=ok, other=0.0)
            for o in tl.static_range(h):
                taken = tl.load(write_gates + b * H + o) * tl.load(allocation_gates + b * H + o)
                used = used + (1.0 - used) * (taken * tl.load(allocation + (b * H + o) * N + n, mask=ok, other=0.0))
            d_free_share = slope * gate * towards_free
            if h + 1 < H:
                d_taken = d_used * (1.0 - used)
                d_gate += tl.sum(d_taken * towards_free * free, axis=0)
                d_towards += tl.sum(d_taken * gate * free, axis=0)
                d_free_share += d_taken * gate * towards_free
                d_used = d_used * (1.0 - gate * towards_free * free)
            entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
            tl.store(scratch + b * N + n, entered, mask=ok)
            tl.store(mass + b * N + n, free * d_free_share, mask=ok)
            tl.debug_barrier()
            logs, behind = allocation_slopes(scratch + b * N, mass + b * N, entered, n, N, NB, BJ)
            tl.debug_barrier()
            d_used += (1.0 - USAGE_EPS) * tl.where(ok, behind / entered - tl.exp(logs) * d_free_share, 0.0)
        tl.store(d_write_gates + b * H + h, d_gate)
        tl.store(d_allocation_gates + b * H + h, d_towards)
        d_found = slope * gate * (1.0 - towards_free)
        d_score = found * (d_found - tl.sum(found * d_found, axis=0))
        cos = tl.load(cosine + at, mask=ok, other=0.0)
        tl.store(d_write_strengths + b * H + h, tl.sum(d_score * (cos - tl.sum(found * cos, axis=0)), axis=0))
        d_cos = d_score * tl.load(write_strengths + b * H + h)
        along += d_cos * cos
        tl.debug_barrier()
        tl.store(cosine + at, d_cos, mask=ok)
    tl.store(projection + b * N + n, along, mask=ok)
    if DEALLOCATE:
        tl.store(mass + b * N + n, tl.zeros((NB,), tl.float32), mask=ok)
    tl.debug_barrier()
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        d_k = tl.zeros((HB, BW), tl.float32)
        d_e = tl.zeros((HB, BW), tl.float32)
        d_v = tl.zeros((HB, BW), tl.float32)
        for first in range(0, N, BN):
            rows = first + tl.arange(0, BN)
            row_ok = rows < N
            inside = row_ok[:, None] & (w < W)[None, :]
            cell = (b * N + rows)[:, None] * W + w[None, :]
            m = tl.load(memory + cell, mask=inside, other=0.0)
            kept = m
            if DEALLOCATE:
                psi = retention(read_weights, free_gates, b, rows, row_ok, N, R)
                kept = m * psi[:, None]
            g = tl.load(d_memory + cell, mask=inside, other=0.0)
            scale = tl.load(inverse + b * N + rows, mask=row_ok, other=0.0)
            unit = kept * scale[:, None]
            d_unit = -unit * tl.load(projection + b * N + rows, mask=row_ok, other=0.0)[:, None]
            for h in tl.static_range(H):
                here = (heads == h)[:, None]
                weight = tl.load(new_write_weights + (b * H + h) * N + rows, mask=row_ok, other=0.0)
                rest = _others(new_write_weights, erase, b, h, rows, row_ok, w, N, W, H, BN, BW)
                d_e -= tl.where(here, tl.sum(g * kept * rest * weight[:, None], axis=0)[None, :], 0.0)
                d_v += tl.where(here, tl.sum(g * weight[:, None], axis=0)[None, :], 0.0)
                d_c = tl.load(cosine + (b * H + h) * N + rows, mask=row_ok, other=0.0)
                k = tl.load(write_keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                k = k * tl.sum(tl.where(heads == h, units, 0.0), axis=0)
                d_unit += d_c[:, None] * k[None, :]
                d_k += tl.where(here, tl.sum(d_c[:, None] * unit, axis=0)[None, :], 0.0)
            d_m = g * _others(new_write_weights, erase, b, H, rows, row_ok, w, N, W, H, BN, BW)
            d_m += d_unit * scale[:, None]
            if DEALLOCATE:
                more = tl.load(mass + b * N + rows, mask=row_ok, other=0.0) + tl.sum(d_m * m, axis=1)
                tl.debug_barrier()
                tl.store(mass + b * N + rows, more, mask=row_ok)
                d_m = d_m * psi[:, None]
            tl.store(d_memory + cell, d_m, mask=inside)
        to = (b * H + heads)[:, None] * W + w[None, :]
        to_ok = (heads < H)[:, None] & (w < W)[None, :]
        tl.store(d_write_keys + to, d_k, mask=to_ok)
        tl.store(d_erase + to, d_e, mask=to_ok)
        tl.store(d_add + to, d_v, mask=to_ok)
        tl.debug_barrier()
    _unit_bwd(write_keys, d_write_keys, b, W, H, HB, WB)
    # Through usage and retention.
    d_psi = tl.zeros((NB,), tl.float32)
    if DEALLOCATE:
        d_psi = tl.load(mass + b * N + n, mask=ok, other=0.0)
    d_wrote = tl.zeros((NB,), tl.float32)
    if TRACK_USAGE:
        d_used += optional(d_new_usage, b * N + n, ok, HAS_USAGE)
        u = tl.load(usage + b * N + n, mask=ok, other=0.0)
        wrote = written(write_weights, b, n, ok, N, H)
        psi_all = retention(read_weights, free_gates, b, n, ok, N, R)
        sum_used = u + wrote * (1.0 - u)
        raw = sum_used * psi_all
        d_used = tl.where((raw < 0.0) | (raw > 1.0), 0.0, d_used)
        d_psi += d_used * sum_used
        d_sum = d_used * psi_all
        tl.store(d_usage + b * N + n, d_sum * (1.0 - wrote), mask=ok)
        if not DETACH:
            d_wrote = d_sum * (1.0 - u)
    for h in tl.static_range(H):
        rest_wrote = d_wrote
        for o in tl.static_range(H):
            if o != h:
                rest_wrote = rest_wrote * (1.0 - tl.load(write_weights + (b * H + o) * N + n, mask=ok, other=0.0))
        tl.store(d_write_weights + (b * H + h) * N + n, rest_wrote, mask=ok)
    for r in tl.static_range(R):
        rest_psi = d_psi
        for o in tl.static_range(R):
            if o != r:
                rest_psi = rest_psi * (
                    1.0
                    - tl.load(free_gates + b * R + o) * tl.load(read_weights + (b * R + o) * N + n, mask=ok, other=0.0)
                )
        at = (b * R + r) * N + n
        read = tl.load(read_weights + at, mask=ok, other=0.0)
        tl.store(d_free + b * R + r, -tl.sum(rest_psi * read, axis=0))
        d_r = tl.load(d_read_weights + at, mask=ok, other=0.0) - rest_psi * tl.load(free_gates + b * R + r)
        tl.debug_barrier()
        tl.store(d_read_weights + at, d_r, mask=ok)


def links_bwd(
    d_new_links: Tensor | None,
    links: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor | None,
    d_mixed: Tensor | None,
    modes: Tensor | None,
    step_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Second launch; without ``read_weights`` only the update, not the reads.

    Returns:
        d_links, x, y, d_rows, d_columns, d_before, and the number of row blocks.
    """
    batch, heads, slots, _ = links.shape
    read_heads = 1 if read_weights is None else read_weights.shape[1]
    block_i, block_j = link_tiles(slots, 2 * read_heads)
    blocks = triton.cdiv(slots, block_i)

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape, slots), dtype=torch.float32, device=links.device)

    d_links, d_rows, d_columns, d_before = empty(slots), empty(), empty(blocks), empty(blocks)
    x, y = (links, links) if read_weights is None else (empty(read_heads), empty(blocks, read_heads))
    _links_bwd[(blocks, batch * heads)](
        links if d_new_links is None else d_new_links, links, precedence, write_weights,
        links if read_weights is None else read_weights, links if d_mixed is None else d_mixed,
        links if modes is None else modes, links if step_mask is None else step_mask,
        d_links, x, y, d_rows, d_columns, d_before, slots,
        H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), HAS_LINKS=d_new_links is not None,
        READ=read_weights is not None, HAS_MASK=step_mask is not None, BI=block_i, BJ=block_j, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return d_links, x, y, d_rows, d_columns, d_before, blocks


def step(
    grads: dict[str, Tensor | None],
    old: dict[str, Tensor],
    said: dict[str, Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    new: dict[str, Tensor],
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    detach_usage: bool,
) -> dict[str, Tensor]:
    """Gradients of one step, by field.

    Args:
        grads: of the new state's fields and of ``reads``, contiguous; None where there is none.
        old: the state before the step.
        new: of the state after it memory, usage, read_weights and write_weights, and what forward saved.
    """
    memory, read_weights = old["memory"], old["read_weights"]
    batch, slots, width = memory.shape
    read_heads, heads = read_weights.shape[1], old["write_weights"].shape[1]
    tile = tiles(slots, width, heads)
    wide = {"num_warps": warps(slots, width)}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=memory.device)

    made = {name: empty(*field.shape) for name, field in said.items()}
    made |= {
        "memory": empty(batch, slots, width),
        "usage": empty(*((batch, slots) if track_usage else (0,))),
        "precedence": empty(*((batch, heads, slots) if track_links else (0,))),
        "read_weights": empty(batch, read_heads, slots),
        "write_weights": empty(batch, heads, slots),
        "sharpness": empty(*((0,) if sharpness is None else sharpness.shape)),
        "links": empty(0),
    }
    d_mixed, cosine = empty(batch, read_heads, slots), empty(batch, read_heads, slots)
    inverse, projection, scratch, mass = (empty(batch, slots) for _ in range(4))

    def given(name: str) -> Tensor:
        found = grads[name]
        return memory if found is None else found

    mask = memory if step_mask is None else step_mask
    with on_device(memory):
        _read_bwd[(batch,)](
            given("reads"), given("read_weights"), given("memory"), new["memory"], new["read_weights"],
            new["read_content"], new["mixed"], said["read_keys"], said["read_strengths"], said["read_modes"],
            memory if sharpness is None else sharpness, mask, d_mixed, made["memory"], made["read_keys"],
            made["read_strengths"], made["read_modes"], made["sharpness"], cosine, inverse, projection, slots, width,
            R=read_heads, RB=triton.next_power_of_2(read_heads), H=heads, TRACK_LINKS=track_links,
            SHARPEN=sharpness is not None, HAS_MASK=step_mask is not None, HAS_READS=grads["reads"] is not None,
            HAS_WEIGHTS=grads["read_weights"] is not None, HAS_MEMORY=grads["memory"] is not None,
            **tile, **wide, **LAUNCH,
        )  # fmt: skip
        x, y, d_rows, d_columns, d_before, blocks = memory, memory, memory, memory, memory, 0
        if track_links:
            made["links"], x, y, d_rows, d_columns, d_before, blocks = links_bwd(
                grads["links"], old["links"], old["precedence"], new["write_weights"], read_weights, d_mixed,
                said["read_modes"], step_mask,
            )  # fmt: skip
        write_cosine, slopes = empty(batch, heads, slots), empty(batch, heads, slots)
        _write_bwd[(batch,)](
            given("memory"), given("usage"), given("precedence"), given("read_weights"), given("write_weights"),
            memory, old["usage"], old["precedence"], read_weights, old["write_weights"], new["usage"],
            new["write_weights"], new["write_content"], new["allocation"], said["write_keys"], said["write_strengths"],
            said["read_modes"], said["erase_vectors"], said["write_vectors"], said["free_gates"],
            said["allocation_gates"], said["write_gates"], mask, x, y, d_rows, d_columns, d_before,
            made["memory"], made["usage"], made["precedence"], made["read_weights"], made["write_weights"],
            made["read_modes"], made["write_keys"], made["write_strengths"], made["write_vectors"],
            made["erase_vectors"], made["free_gates"], made["allocation_gates"], made["write_gates"],
            slopes, write_cosine, inverse, projection, scratch, mass, slots, width, blocks,
            R=read_heads, H=heads, HB=triton.next_power_of_2(heads), TRACK_USAGE=track_usage, TRACK_LINKS=track_links,
            DEALLOCATE=deallocate, DETACH=detach_usage, HAS_MASK=step_mask is not None,
            HAS_MEMORY=grads["memory"] is not None, HAS_USAGE=grads["usage"] is not None,
            HAS_PRECEDENCE=grads["precedence"] is not None, HAS_READ=grads["read_weights"] is not None,
            HAS_WRITE=grads["write_weights"] is not None,
            **tile, BJ=max(1, min(32, 4096 // tile["NB"])), **wide, **EXACT,
        )  # fmt: skip
    return made
