"""Pieces of the routing kernels: one row's softmax and loss terms, and sums over all rows that no race can change.

A sum over rows goes through two tickets. Every program stores its terms; the last of each group of :data:`GROUP`
programs adds its group's in order, and the last group adds the groups'. So one launch makes the whole sum, each of its
readers reads little, and its order depends on the shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._common import arrive_last, tickets

GROUP = 64
ENTROPY_EPS = tl.constexpr(1e-10)
ZERO_ROW = tl.constexpr(1e-10)
NO_SLOT = tl.constexpr(-(2**31))
"""Order key of nothing, below that of every number."""


def group_count(blocks: int) -> int:
    return triton.cdiv(blocks, GROUP)


def group_tickets(like: Tensor, blocks: int, more: int = 0) -> Tensor:
    """One ticket for the groups, one for each group, and ``more`` of the caller's own behind them."""
    return tickets(like.device, 1 + group_count(blocks) + more)


@triton.jit
def order_key(x):
    """float32 -> int32 with the same order, -0 as 0 and NaN above everything."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, 0x7FC00000).to(tl.int32)


@triton.jit
def from_order_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def clamp(x, limit):
    """To [-limit, limit]; NaN stays."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), x)


@triton.jit
def row_softmax(z, columns, K, temperature):
    """softmax(z / temperature) of (rows, BLOCK_K), with zeros past column K, and the rows' maxima."""
    inside = columns < K
    top = tl.max(tl.where(inside, z, float("-inf")), 1)
    e = tl.where(inside, tl.exp((z - top[:, None]) / temperature), 0.0)
    return e / tl.sum(e, 1)[:, None], top


@triton.jit
def row_entropy(p):
    """-sum p log(p + eps); zeros add nothing."""
    return -tl.sum(p * tl.log(p + ENTROPY_EPS), 1)


@triton.jit
def entropy_slope(p):
    return -(tl.log(p + ENTROPY_EPS) + p / (p + ENTROPY_EPS))


@triton.jit
def sum_terms(terms, first, count, stride, columns, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``first`` to ``first + count`` of a matrix of terms, added in order; other programs wrote them."""
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, count, TILE):
        row = start + tl.arange(0, TILE)
        at = terms + (first + row).to(tl.int64)[:, None] * stride + columns[None, :]
        inside = (row < count)[:, None] & (columns < width)[None, :]
        total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def load_terms(p, counted, columns, terms, block, K, BLOCK_K: tl.constexpr):
    """Store what the loss needs of these rows: how often each expert is the argmax, its probability, the rows."""
    top = tl.max(p, 1)
    # Ties go to the lowest expert; a row of NaN equals nothing and counts for the first.
    winner = tl.min(tl.where(p == top[:, None], columns, BLOCK_K), 1)
    winner = tl.where(winner == BLOCK_K, 0, winner)
    won = (winner[:, None] == columns) & counted[:, None]
    own = terms + block.to(tl.int64) * (2 * K + 1)
    k = tl.arange(0, BLOCK_K)
    tl.store(own + k, tl.sum(won.to(tl.float32), 0), mask=k < K)
    tl.store(own + K + k, tl.sum(tl.where(counted[:, None], p, 0.0), 0), mask=k < K)
    tl.store(own + 2 * K, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def write_loss(terms, first, count, K, loss, loss_weights, BLOCK_K: tl.constexpr):
    TILE: tl.constexpr = 8 if BLOCK_K <= 256 else 1
    k = tl.arange(0, BLOCK_K)
    stride = 2 * K + 1
    counts = sum_terms(terms, first, count, stride, k, K, TILE, BLOCK_K)
    mass = sum_terms(terms + K, first, count, stride, k, K, TILE, BLOCK_K)
    rows = tl.maximum(tl.sum(sum_terms(terms + 2 * K, first, count, stride, tl.arange(0, 1), 1, 64, 1), 0), 1.0)
    share = counts / rows
    tl.store(loss, K * tl.sum(share * (mass / rows), 0))
    if loss_weights is not None:
        tl.store(loss_weights + k, K * share / rows, mask=k < K)


@triton.jit
def finish_loss(
    terms, groups, ticket, block, blocks, K, loss, loss_weights, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """After :func:`load_terms`: the last program of all writes the loss."""
    TILE: tl.constexpr = 8 if BLOCK_K <= 256 else 1
    group = block // GROUP
    first = group * GROUP
    members = tl.minimum(GROUP, blocks - first)
    group_total = tl.cdiv(blocks, GROUP)
    if arrive_last(ticket + 1 + group, members):
        if group_total == 1:
            write_loss(terms, first, members, K, loss, loss_weights, BLOCK_K)
        else:
            stride = 2 * K + 1
            k = tl.arange(0, BLOCK_K)
            own = groups + group.to(tl.int64) * stride
            for part in tl.static_range(2):
                total = sum_terms(terms + part * K, first, members, stride, k, K, TILE, BLOCK_K)
                tl.store(own + part * K + k, total, mask=k < K)
            rows = sum_terms(terms + 2 * K, first, members, stride, tl.arange(0, 1), 1, 64, 1)
            tl.store(own + 2 * K + tl.arange(0, 1), rows)
            if arrive_last(ticket, group_total):
                write_loss(groups, 0, group_total, K, loss, loss_weights, BLOCK_K)


@triton.jit
def write_sums(terms, first, count, K, stride, bias, temperature, BLOCK_K: tl.constexpr):
    TILE: tl.constexpr = 8 if BLOCK_K <= 256 else 1
    k = tl.arange(0, BLOCK_K)
    if bias is not None:
        tl.store(bias + k, sum_terms(terms, first, count, stride, k, K, TILE, BLOCK_K), mask=k < K)
    if temperature is not None:
        one = tl.arange(0, 1)
        tl.store(temperature + one, sum_terms(terms + K, first, count, stride, one, 1, 64, 1))


@triton.jit
def finish_sums(terms, groups, ticket, block, blocks, K, bias, temperature, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """K sums and one more over the rows of ``terms`` (blocks, K + 1), written by the last program of all."""
    stride = K + 1
    group = block // GROUP
    first = group * GROUP
    members = tl.minimum(GROUP, blocks - first)
    group_total = tl.cdiv(blocks, GROUP)
    if arrive_last(ticket + 1 + group, members):
        if group_total == 1:
            write_sums(terms, first, members, K, stride, bias, temperature, BLOCK_K)
        else:
            own = groups + group.to(tl.int64) * stride
            write_sums(terms, first, members, K, stride, own, own + K, BLOCK_K)
            if arrive_last(ticket, group_total):
                write_sums(groups, 0, group_total, K, stride, bias, temperature, BLOCK_K)
