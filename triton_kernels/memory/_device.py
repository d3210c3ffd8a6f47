"""What the memory kernels share on the device. N slots, W columns, H write heads, R read heads; all float32.

A vector over the slots has NB lanes, the next power of two. Where a vector is needed both along rows and along columns,
or in blocks, it goes through global memory: the program stores it, waits at a barrier and loads it back.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-12)
USAGE_EPS = tl.constexpr(1e-6)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def retention(read_weights, free_gates, b, n, ok, N, R: tl.constexpr):
    """prod_r (1 - f_r w_r) of the slots ``n`` of batch item ``b``."""
    total = tl.where(ok, 1.0, 0.0)
    for r in tl.static_range(R):
        w = tl.load(read_weights + (b * R + r) * N + n, mask=ok, other=0.0)
        total = total * (1.0 - tl.load(free_gates + b * R + r) * w)
    return total


@triton.jit
def written(write_weights, b, n, ok, N, H: tl.constexpr):
    """1 - prod_h (1 - w_h)."""
    total = tl.load(write_weights + b * H * N + n, mask=ok, other=0.0)
    for h in tl.static_range(1, H):
        total = total + tl.load(write_weights + (b * H + h) * N + n, mask=ok, other=0.0) * (1.0 - total)
    return total


@triton.jit
def retention_of_others(read_weights, free_gates, b, r, n, ok, N, R: tl.constexpr):
    """:func:`retention` without read head ``r``."""
    total = tl.where(ok, 1.0, 0.0)
    for o in range(R):
        w = tl.load(read_weights + (b * R + o) * N + n, mask=ok, other=0.0)
        total = total * tl.where(o == r, 1.0, 1.0 - tl.load(free_gates + b * R + o) * w)
    return total


@triton.jit
def kept_by_others(write_weights, b, h, n, ok, N, H: tl.constexpr):
    """prod of 1 - w_g over the write heads g other than ``h``."""
    total = tl.where(ok, 1.0, 0.0)
    for g in range(H):
        w = tl.load(write_weights + (b * H + g) * N + n, mask=ok, other=0.0)
        total = total * tl.where(g == h, 1.0, 1.0 - w)
    return total


@triton.jit
def softmax(score, ok):
    """Over the lanes that are ``ok``; 0 in the others, and everywhere when there is none."""
    best = tl.max(tl.where(ok, score, float("-inf")), axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    e = tl.where(ok, tl.exp(score - best), 0.0)
    mass = tl.sum(e, axis=0)
    return e / tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def _squared_lengths(keys, b, W, H: tl.constexpr, HB: tl.constexpr, BW: tl.constexpr):
    """|key|^2 of each head, a tile of columns at a time: (HB,)."""
    h = tl.arange(0, HB)
    total = tl.zeros((HB,), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        k = tl.load(keys + (b * H + h)[:, None] * W + w[None, :], mask=(h < H)[:, None] & (w < W)[None, :], other=0.0)
        total += tl.sum(k * k, axis=1)
    return total


@triton.jit
def unit_factors(keys, b, W, H: tl.constexpr, HB: tl.constexpr, BW: tl.constexpr):
    """1 / |key| of each head, by the rule that a zero key scores 0."""
    return 1.0 / tl.sqrt(_squared_lengths(keys, b, W, H, HB, BW) + NORM_EPS)


@triton.jit
def key_factors(keys, strengths, b, W, H: tl.constexpr, HB: tl.constexpr, BW: tl.constexpr):
    """strength / |key| of each head."""
    h = tl.arange(0, HB)
    beta = tl.load(strengths + b * H + h, mask=h < H, other=0.0)
    return beta / tl.sqrt(_squared_lengths(keys, b, W, H, HB, BW) + NORM_EPS)


@triton.jit
def unit_bwd(keys, d_keys, b, W, H: tl.constexpr, HB: tl.constexpr, BW: tl.constexpr):
    """The gradients of unit keys, in place those of the keys."""
    h = tl.arange(0, HB)
    factor = unit_factors(keys, b, W, H, HB, BW)
    along = tl.zeros((HB,), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        at, ok = (b * H + h)[:, None] * W + w[None, :], (h < H)[:, None] & (w < W)[None, :]
        unit = tl.load(keys + at, mask=ok, other=0.0) * factor[:, None]
        along += tl.sum(unit * tl.load(d_keys + at, mask=ok, other=0.0), axis=1)
    # What rounding left along the key: exactly, unit . across = along (1 - |unit|^2) = along eps / (|k|^2 + eps).
    left = -along * (NORM_EPS * factor * factor)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        at, ok = (b * H + h)[:, None] * W + w[None, :], (h < H)[:, None] & (w < W)[None, :]
        unit = tl.load(keys + at, mask=ok, other=0.0) * factor[:, None]
        across = tl.load(d_keys + at, mask=ok, other=0.0) - unit * along[:, None]
        left += tl.sum(unit * across, axis=1)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        at, ok = (b * H + h)[:, None] * W + w[None, :], (h < H)[:, None] & (w < W)[None, :]
        unit = tl.load(keys + at, mask=ok, other=0.0) * factor[:, None]
        across = tl.load(d_keys + at, mask=ok, other=0.0) - unit * along[:, None]
        tl.debug_barrier()  # a lane may be held by several threads, and none may read what another has replaced
        tl.store(d_keys + at, factor[:, None] * (across - unit * left[:, None]), mask=ok)


@triton.jit
def zero_rows(rows, b, W, H: tl.constexpr, HB: tl.constexpr, BW: tl.constexpr):
    """(B, H, W) gets zeros for batch item ``b``."""
    h = tl.arange(0, HB)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        at = (b * H + h)[:, None] * W + w[None, :]
        tl.store(rows + at, tl.zeros((HB, BW), tl.float32), mask=(h < H)[:, None] & (w < W)[None, :])


@triton.jit
def logs_before(entered_pointer, entered, n, N, NB: tl.constexpr, BJ: tl.constexpr):
    """Sum of log entered_j over the slots j that come before each slot: less used, or as used and lower."""
    total = tl.zeros((NB,), tl.float32)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        other = tl.load(entered_pointer + j, mask=j < N, other=float("inf"))
        first = (other[None, :] < entered[:, None]) | ((other[None, :] == entered[:, None]) & (j[None, :] < n[:, None]))
        total += tl.sum(tl.where(first, tl.log(other)[None, :], 0.0), axis=1)
    return total


@triton.jit
def sharpened(w, gamma, ok):
    """w^gamma / sum w^gamma; what is below the normal numbers counts as 0, an all-zero row stays 0."""
    positive = ok & (w >= TINY)
    logarithm = tl.where(positive, tl.log(tl.where(positive, w, 1.0)), float("-inf"))
    best = tl.max(logarithm, axis=0)
    # The difference first: what gamma multiplies is small where it counts, and so is its rounding.
    logit = (logarithm - tl.where(best == float("-inf"), 0.0, best)) * gamma
    return softmax(logit, positive) + tl.sum(tl.where(w == w, 0.0, w), axis=0)


@triton.jit
def optional(pointer, at, mask, HAS: tl.constexpr):
    """What stands there, or zeros where there is no tensor."""
    if HAS:
        x = tl.load(pointer + at, mask=mask, other=0.0)
    else:
        x = tl.where(mask, 0.0, 0.0)
    return x


@triton.jit
def partial_sum(partials, plane, blocks, r, n, ok, N, R: tl.constexpr):
    """Row blocks of (planes, blocks, R, N) partials, added in order."""
    total = tl.where(ok, 0.0, 0.0)
    for block in range(blocks):
        total += tl.load(partials + ((plane * blocks + block) * R + r) * N + n, mask=ok, other=0.0)
    return total


@triton.jit
def rewritten(m, write_weights, erase_vectors, write_vectors, b, n, ok, w, N, W, H: tl.constexpr):
    """A block of memory after erasing and adding."""
    added = tl.zeros_like(m)
    for h in tl.static_range(H):
        weight = tl.load(write_weights + (b * H + h) * N + n, mask=ok, other=0.0)
        erase = tl.load(erase_vectors + (b * H + h) * W + w, mask=w < W, other=0.0)
        add = tl.load(write_vectors + (b * H + h) * W + w, mask=w < W, other=0.0)
        m = m * (1.0 - weight[:, None] * erase[None, :])
        added += weight[:, None] * add[None, :]
    return m + added


@triton.jit
def others(weights, erase, b, h, n, ok, w, N, W, H: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """prod of 1 - w_g e_g^T over the heads g other than ``h``; over all of them for ``h`` = H."""
    product = tl.zeros((BN, BW), tl.float32) + 1.0
    for g in range(H):
        weight = tl.load(weights + (b * H + g) * N + n, mask=ok, other=0.0)
        e = tl.load(erase + (b * H + g) * W + w, mask=w < W, other=0.0)
        product = product * tl.where(g == h, 1.0, 1.0 - weight[:, None] * e[None, :])
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
