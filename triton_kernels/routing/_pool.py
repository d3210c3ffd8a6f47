"""Pooling over the slots of a row: mean and maximum by columns, attention over whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ._shared import NO_SLOT, from_order_key, order_key


@triton.jit
def slots_taken(slot_mask, row, slots, S):
    """Which of these slots take part; ``row`` is int64."""
    taken = slots < S
    if slot_mask is not None:
        taken = taken & (tl.load(slot_mask + row * S + slots, mask=taken, other=0) != 0)
    return taken


@triton.jit
def pool_row(
    hiddens, slot_mask, row, d, inside, S, stride_b, stride_s, stride_d,
    POOLING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns ``d`` of one row, pooled, and for the maximum the winning slots (-1: no slot)."""
    base = hiddens + row * stride_b
    count = tl.zeros((BLOCK_S,), tl.int32)
    if POOLING == 0:
        total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    else:
        best = tl.full((BLOCK_S, BLOCK_D), NO_SLOT, tl.int32)
        winner = tl.full((BLOCK_S, BLOCK_D), -1, tl.int32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        taken = slots_taken(slot_mask, row, s, S)
        lanes = taken[:, None] & inside[None, :]
        at = base + s.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
        x = tl.load(at, mask=lanes, other=0.0).to(tl.float32)
        if POOLING == 0:
            total += x
            count += taken.to(tl.int32)
        else:
            key = tl.where(lanes, order_key(x), NO_SLOT)
            better = key > best
            best = tl.where(better, key, best)
            winner = tl.where(better, s[:, None], winner)
    if POOLING == 0:
        pooled = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        where = tl.full((BLOCK_D,), -1, tl.int32)
    else:
        top = tl.max(best, 0)
        where = tl.min(tl.where(best == top[None, :], winner, 0x7FFFFFFF), 0)
        pooled = tl.where(top == NO_SLOT, 0.0, from_order_key(top))
        where = tl.where(top == NO_SLOT, -1, where)
    return pooled, where


@triton.jit
def pool_rows(
    hiddens, slot_mask, rows, d, lanes, B, S, stride_b, stride_s, stride_d,
    POOLING: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """:func:`pool_row` of BLOCK_B rows at once, slot by slot."""
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    count = tl.zeros((BLOCK_B,), tl.int32)
    best = tl.full((BLOCK_B, BLOCK_D), NO_SLOT, tl.int32)
    where = tl.full((BLOCK_B, BLOCK_D), -1, tl.int32)
    base = hiddens + rows[:, None] * stride_b + d[None, :] * stride_d
    for s in range(S):
        taken = rows < B
        if slot_mask is not None:
            taken = taken & (tl.load(slot_mask + rows * S + s, mask=taken, other=0) != 0)
        use = lanes & taken[:, None]
        offset = tl.cast(s, tl.int64) * stride_s
        x = tl.load(base + offset, mask=use, other=0.0).to(tl.float32)
        if POOLING == 0:
            total += x
            count += taken.to(tl.int32)
        else:
            key = tl.where(use, order_key(x), NO_SLOT)
            better = key > best
            best = tl.where(better, key, best)
            where = tl.where(better, s, where)
    if POOLING == 0:
        pooled = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    else:
        pooled = tl.where(best == NO_SLOT, 0.0, from_order_key(best))
    return pooled, where


@triton.jit
def pool_attention(
    hiddens, query, slot_mask, slot_weights, pooled, row, root, S, D, stride_b, stride_s, stride_d,
    WHOLE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row by attention into ``pooled`` (B, D), its weights into ``slot_weights`` (B, S) or None.

    WHOLE: BLOCK_W holds a whole slot, and one pass with a running maximum reads each slot once. Wider slots are read
    twice, the scores waiting in ``slot_weights``.
    """
    base = hiddens + row * stride_b
    top = float("-inf")
    mass = 0.0
    d = tl.arange(0, BLOCK_W)
    if WHOLE:
        q = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, S, BLOCK_A):
        s = start + tl.arange(0, BLOCK_A)
        taken = slots_taken(slot_mask, row, s, S)
        at = base + s.to(tl.int64)[:, None] * stride_s
        if WHOLE:
            lanes = taken[:, None] & (d < D)[None, :]
            x = tl.load(at + d[None, :] * stride_d, mask=lanes, other=0.0).to(tl.float32)
            score = tl.sum(x * q[None, :], 1) * root
        else:
            products = tl.zeros((BLOCK_A, BLOCK_W), tl.float32)
            for first in range(0, D, BLOCK_W):
                e = first + d
                lanes = taken[:, None] & (e < D)[None, :]
                x = tl.load(at + e[None, :] * stride_d, mask=lanes, other=0.0).to(tl.float32)
                products += x * tl.load(query + e, mask=e < D, other=0.0).to(tl.float32)[None, :]
            score = tl.sum(products, 1) * root
        score = tl.where(taken, score, float("-inf"))
        if slot_weights is not None:
            tl.store(slot_weights + row * S + s, score, mask=s < S)
        most = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.where(taken, tl.exp(score - shift), 0.0)
        fade = tl.exp(top - shift)
        mass = mass * fade + tl.sum(weight, 0)
        if WHOLE:
            total = total * fade + tl.sum(weight[:, None] * x, 0)
        top = most
    if WHOLE:
        total = tl.where(mass == 0, 0.0, total / mass)
        tl.store(pooled + row * D + d, total, mask=d < D)
    if slot_weights is not None:
        tl.debug_barrier()
        for start in range(0, S, 128):
            s = start + tl.arange(0, 128)
            score = tl.load(slot_weights + row * S + s, mask=s < S, other=float("-inf"))
            weight = tl.where(score == float("-inf"), 0.0, tl.exp(score - top) / mass)
            tl.store(slot_weights + row * S + s, weight, mask=s < S)
    if not WHOLE:
        tl.debug_barrier()
        for first in range(0, D, BLOCK_W):
            e = first + d
            column = tl.zeros((BLOCK_W,), tl.float32)
            for start in range(0, S, BLOCK_A):
                s = start + tl.arange(0, BLOCK_A)
                taken = slots_taken(slot_mask, row, s, S)
                lanes = taken[:, None] & (e < D)[None, :]
                at = base + s.to(tl.int64)[:, None] * stride_s + e[None, :] * stride_d
                x = tl.load(at, mask=lanes, other=0.0).to(tl.float32)
                weight = tl.load(slot_weights + row * S + s, mask=taken, other=0.0)
                column += tl.sum(weight[:, None] * x, 0)
            tl.store(pooled + row * D + e, column, mask=e < D)
