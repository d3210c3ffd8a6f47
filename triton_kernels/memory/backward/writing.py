"""Back through the write: erase and add, write weights, allocation, usage."""

from __future__ import annotations

import triton
import triton.language as tl

from .._device import (
    NORM_EPS,
    USAGE_EPS,
    allocation_slopes,
    kept_by_others,
    optional,
    others,
    partial_sum,
    retention,
    retention_of_others,
    unit_bwd,
    unit_factors,
    written,
    zero_rows,
)
from .links import precedence_bwd


@triton.jit
def _pass_on(given, target, at, mask, HAS: tl.constexpr):
    tl.store(target + at, optional(given, at, mask, HAS), mask=mask)


@triton.jit
def write_bwd(
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
    NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """``d_memory`` comes as the gradient of the new memory and becomes that of the old one."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    heads = tl.arange(0, HB)
    if HAS_MASK:  # noqa: SIM102 - decided when the kernel is compiled, and without a mask there is none to load
        if tl.load(step_mask + b) == 0:
            for first in range(0, N * W, BN * BW):
                at = first + tl.arange(0, BN * BW)
                _pass_on(d_new_memory, d_memory, b * N * W + at, at < N * W, HAS_MEMORY)
            if TRACK_USAGE:
                _pass_on(d_new_usage, d_usage, b * N + n, ok, HAS_USAGE)
            zero_rows(d_write_keys, b, W, H, HB, BW)
            zero_rows(d_add, b, W, H, HB, BW)
            zero_rows(d_erase, b, W, H, HB, BW)
            for h in range(H):
                if TRACK_LINKS:
                    _pass_on(d_new_precedence, d_precedence, (b * H + h) * N + n, ok, HAS_PRECEDENCE)
                _pass_on(d_new_write_weights, d_write_weights, (b * H + h) * N + n, ok, HAS_WRITE)
                tl.store(d_write_strengths + b * H + h, 0.0)
                tl.store(d_allocation_gates + b * H + h, 0.0)
                tl.store(d_write_gates + b * H + h, 0.0)
            for r in range(R):
                _pass_on(d_new_read_weights, d_read_weights, (b * R + r) * N + n, ok, HAS_READ)
                tl.store(d_free + b * R + r, 0.0)
            return
    # Through links, precedence and directional reads.
    for h in range(H):
        plane = b * H + h
        slope = optional(d_new_write_weights, plane * N + n, ok, HAS_WRITE)
        if TRACK_LINKS:
            slope += precedence_bwd(
                d_new_precedence, precedence, new_write_weights, d_rows, d_columns, d_before, d_precedence, plane,
                blocks, n, ok, N, HAS_PRECEDENCE,
            )  # fmt: skip
        tl.store(slopes + plane * N + n, slope, mask=ok)
    for r in range(R):
        at = (b * R + r) * N + n
        d_r = tl.zeros((NB,), tl.float32)
        if TRACK_LINKS:
            read = tl.load(read_weights + at, mask=ok, other=0.0)
            mode = (b * R + r) * (1 + 2 * H)
            for h in range(H):
                plane = b * H + h
                lines = tl.load(x + (plane * R + r) * N + n, mask=ok, other=0.0)
                cols = partial_sum(y, plane, blocks, r, n, ok, N, R)
                tl.store(d_modes + mode + h, tl.sum(read * lines, axis=0))
                tl.store(d_modes + mode + H + 1 + h, tl.sum(read * cols, axis=0))
                d_r += tl.load(modes + mode + H + 1 + h) * cols + tl.load(modes + mode + h) * lines
        tl.store(d_read_weights + at, d_r, mask=ok)
    tl.debug_barrier()
    # Through erase and add; the cosines of the write lookup on the way.
    units = unit_factors(write_keys, b, W, H, HB, BW)
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
            for h in range(H):
                k = tl.load(write_keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                e = tl.load(erase + (b * H + h) * W + w, mask=w < W, other=0.0)
                v = tl.load(add + (b * H + h) * W + w, mask=w < W, other=0.0)
                rest = others(new_write_weights, erase, b, h, rows, row_ok, w, N, W, H, BN, BW)
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
    for behind_h in range(H):
        h = H - 1 - behind_h
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
            for o in range(h):
                taken = tl.load(write_gates + b * H + o) * tl.load(allocation_gates + b * H + o)
                used = used + (1.0 - used) * (taken * tl.load(allocation + (b * H + o) * N + n, mask=ok, other=0.0))
            d_free_share = slope * gate * towards_free
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
            for h in range(H):
                here = (heads == h)[:, None]
                weight = tl.load(new_write_weights + (b * H + h) * N + rows, mask=row_ok, other=0.0)
                rest = others(new_write_weights, erase, b, h, rows, row_ok, w, N, W, H, BN, BW)
                d_e -= tl.where(here, tl.sum(g * kept * rest * weight[:, None], axis=0)[None, :], 0.0)
                d_v += tl.where(here, tl.sum(g * weight[:, None], axis=0)[None, :], 0.0)
                d_c = tl.load(cosine + (b * H + h) * N + rows, mask=row_ok, other=0.0)
                k = tl.load(write_keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                k = k * tl.sum(tl.where(heads == h, units, 0.0), axis=0)
                d_unit += d_c[:, None] * k[None, :]
                d_k += tl.where(here, tl.sum(d_c[:, None] * unit, axis=0)[None, :], 0.0)
            d_m = g * others(new_write_weights, erase, b, H, rows, row_ok, w, N, W, H, BN, BW)
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
    unit_bwd(write_keys, d_write_keys, b, W, H, HB, BW)
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
    for h in range(H):
        rest = kept_by_others(write_weights, b, h, n, ok, N, H)
        tl.store(d_write_weights + (b * H + h) * N + n, d_wrote * rest, mask=ok)
    for r in range(R):
        rest = d_psi * retention_of_others(read_weights, free_gates, b, r, n, ok, N, R)
        at = (b * R + r) * N + n
        read = tl.load(read_weights + at, mask=ok, other=0.0)
        tl.store(d_free + b * R + r, -tl.sum(rest * read, axis=0))
        d_r = tl.load(d_read_weights + at, mask=ok, other=0.0) - rest * tl.load(free_gates + b * R + r)
        tl.debug_barrier()
        tl.store(d_read_weights + at, d_r, mask=ok)
