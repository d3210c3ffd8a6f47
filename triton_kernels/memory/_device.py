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
def softmax(score, ok):
    """Over the lanes that are ``ok``; 0 in the others, and everywhere when there is none."""
    best = tl.max(tl.where(ok, score, float("-inf")), axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    e = tl.where(ok, tl.exp(score - best), 0.0)
    mass = tl.sum(e, axis=0)
    return e / tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def key_factors(keys, strengths, b, W, H: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """strength / |key| of each head, by the rule that a zero key scores 0: (HB,)."""
    h, w = tl.arange(0, HB), tl.arange(0, WB)
    k = tl.load(keys + (b * H + h)[:, None] * W + w[None, :], mask=(h < H)[:, None] & (w < W)[None, :], other=0.0)
    beta = tl.load(strengths + b * H + h, mask=h < H, other=0.0)
    return beta / tl.sqrt(tl.sum(k * k, axis=1) + NORM_EPS)


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
    logit = tl.where(positive, gamma * tl.log(tl.where(positive, w, 1.0)), float("-inf"))
    return softmax(logit, positive) + tl.sum(tl.where(w == w, 0.0, w), axis=0)
