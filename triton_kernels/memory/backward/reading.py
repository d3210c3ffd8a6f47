"""Back through reading: sharpening, the mix of modes, the read lookup, and the read vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from .._device import NORM_EPS, TINY, optional, unit_bwd, unit_factors, zero_rows


@triton.jit
def read_bwd(
    d_reads, d_read_weights, d_new_memory, memory, read_weights, content, mixed, keys, strengths, modes, sharpness,
    step_mask, d_mixed, d_memory, d_keys, d_strengths, d_modes, d_sharpness, cosine, inverse, projection, N, W,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, TRACK_LINKS: tl.constexpr, SHARPEN: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_READS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MEMORY: tl.constexpr,
    NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``memory`` and ``read_weights`` are those after the step; ``d_memory`` becomes the gradient of that memory."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    if HAS_MASK:  # noqa: SIM102 - decided when the kernel is compiled, and without a mask there is none to load
        if tl.load(step_mask + b) == 0:
            zero_rows(d_keys, b, W, R, RB, BW)
            for head in range(R):
                tl.store(d_strengths + b * R + head, 0.0)
                if SHARPEN:
                    tl.store(d_sharpness + b * R + head, 0.0)
            for head in range(R * (1 + 2 * H)):
                tl.store(d_modes + b * R * (1 + 2 * H) + head, 0.0)
            return
    units = unit_factors(keys, b, W, R, RB, BW)
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
    for head in range(R):
        at = (b * R + head) * N + n
        slope = tl.load(d_mixed + at, mask=ok, other=0.0) + optional(d_read_weights, at, ok, HAS_WEIGHTS)
        if SHARPEN:
            before = tl.load(mixed + at, mask=ok, other=0.0)
            after = tl.load(read_weights + at, mask=ok, other=0.0)
            gamma = tl.load(sharpness + b * R + head)
            positive = ok & (before >= TINY)
            safe = tl.where(positive, before, 1.0)
            d_logit = tl.where(positive, after * (slope - tl.sum(after * slope, axis=0)), 0.0)
            tl.store(d_sharpness + b * R + head, tl.sum(d_logit * tl.log(safe), axis=0))
            slope = d_logit * gamma / safe
        tl.debug_barrier()
        tl.store(d_mixed + at, slope, mask=ok)
        found = tl.load(content + at, mask=ok, other=0.0)
        share = tl.load(modes + (b * R + head) * (1 + 2 * H) + H)
        if TRACK_LINKS:
            tl.store(d_modes + (b * R + head) * (1 + 2 * H) + H, tl.sum(slope * found, axis=0))
        else:
            share = tl.where(share == 0.0, 0.0, 1.0)
            for mode in range(1 + 2 * H):
                tl.store(d_modes + (b * R + head) * (1 + 2 * H) + mode, 0.0)
        d_found = share * slope
        d_score = found * (d_found - tl.sum(found * d_found, axis=0))
        cos = tl.load(cosine + at, mask=ok, other=0.0)
        # A covariance: d_score sums to zero, so the mean costs nothing and saves digits where cosines are alike.
        tl.store(d_strengths + b * R + head, tl.sum(d_score * (cos - tl.sum(found * cos, axis=0)), axis=0))
        d_cos = d_score * tl.load(strengths + b * R + head)
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
    unit_bwd(keys, d_keys, b, W, R, RB, BW)
