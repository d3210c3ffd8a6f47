"""Forward of route_experts in one launch: pool, project, softmax, entropy, and the loss over all rows.

Programs are (row blocks, splits of D). Each pools its columns and multiplies them with the weight's; the last split of
a row block adds the partial logits in order and finishes the rows, and the last row block finishes the loss.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import arrive_last, cast, mdot, on_device
from ._configs import launch_options, row_config
from ._pool import pool_attention, pool_row, pool_rows
from ._saved import saved_size, split_saved
from ._shared import (
    GROUP,
    ZERO_ROW,
    clamp,
    finish_loss,
    group_count,
    group_tickets,
    load_terms,
    row_entropy,
    row_softmax,
)


@triton.jit
def _finish(
    z, small, rows, block, bias, temperature, row_mask, probs, logits, entropy, loss, raw, loss_weights, zero_rows,
    terms, groups, ticket, B, K, temperature_value, limit, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From projected rows (BLOCK_B, BLOCK_K) to everything that is K wide, and the loss."""
    k = tl.arange(0, BLOCK_K)[None, :]
    valid = rows < B
    lanes = valid[:, None] & (k < K)
    at = rows[:, None] * K + k
    if bias is not None:
        z += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    clamped = clamp(z, limit)
    tl.store(logits + at, clamped, mask=lanes)
    if raw is not None:
        tl.store(raw + at, z, mask=lanes)
        tl.store(zero_rows + rows, small.to(tl.uint8), mask=valid)
    t = temperature_value
    if temperature is not None:
        t = tl.load(temperature).to(tl.float32)
    routed, _ = row_softmax(clamped, k, K, t)
    p = tl.where(small[:, None] & (k < K), 1.0 / K, routed)
    tl.store(probs + at, cast(p, probs.dtype.element_ty), mask=lanes)
    tl.store(entropy + rows, row_entropy(p), mask=valid)
    counted = valid
    if row_mask is not None:
        counted = valid & (tl.load(row_mask + rows, mask=valid, other=0) != 0)
    load_terms(p, counted, k, terms, block, K, BLOCK_K)
    finish_loss(terms, groups, ticket, block, tl.num_programs(0), K, loss, loss_weights, GROUP, BLOCK_K)


@triton.jit
def _forward(
    hiddens, weight, bias, temperature, query, slot_mask, row_mask,
    probs, logits, entropy, loss, raw, saved_pool, slot_weights, loss_weights, zero_rows,
    pooled, partial, large_parts, terms, groups, ticket,
    B, S, D, K, stride_b, stride_s, stride_d, split_width, temperature_value, limit, root,
    POOLING: tl.constexpr, DOT: tl.constexpr, LOW: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = block.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    first = split * split_width
    last = tl.minimum(first + split_width, D)
    if POOLING == 2:
        pool_attention(
            hiddens, query, slot_mask, slot_weights, pooled, row, root, S, D, stride_b, stride_s, stride_d,
            WHOLE, BLOCK_A, BLOCK_W,
        )  # fmt: skip
        tl.debug_barrier()
    if DOT:
        products = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    else:
        products = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    large = tl.zeros((BLOCK_B,), tl.int32)
    for start in range(first, last, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < last
        if DOT:
            lanes = (rows < B)[:, None] & inside[None, :]
            x, where = pool_rows(
                hiddens, slot_mask, rows, d, lanes, B, S, stride_b, stride_s, stride_d, POOLING, BLOCK_B, BLOCK_D
            )
            at = rows[:, None] * D + d[None, :]
            # (D, K): the weight is read along its rows all the same.
            w = tl.load(
                weight + k[None, :].to(tl.int64) * D + d[:, None], mask=(k < K)[None, :] & inside[:, None], other=0.0
            )
            if LOW:
                # One unmasked slot is its own pool: as exact in its own dtype as in float32.
                products = mdot(cast(x, weight.dtype.element_ty), w, products, "ieee")
            else:
                products = mdot(x, w.to(tl.float32), products, "ieee")
            large = tl.maximum(large, tl.max((lanes & ~(tl.abs(x) < ZERO_ROW)).to(tl.int32), 1))
        else:
            lanes = inside
            at = row * D + d
            if POOLING == 2:
                x = tl.load(pooled + at, mask=inside, other=0.0)
                where = d
            else:
                x, where = pool_row(
                    hiddens, slot_mask, row, d, inside, S, stride_b, stride_s, stride_d, POOLING, BLOCK_S, BLOCK_D
                )
            at_w = weight + k[:, None].to(tl.int64) * D + d[None, :]
            w = tl.load(at_w, mask=(k < K)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            products += w * x[None, :]
            large = tl.maximum(large, tl.max((lanes & ~(tl.abs(x) < ZERO_ROW)).to(tl.int32), 0))
        if saved_pool is not None:
            if POOLING == 1:
                tl.store(saved_pool + at, where, mask=lanes)
            elif POOLING == 0:
                tl.store(saved_pool + at, x, mask=lanes)
    if DOT:
        z = products
    else:
        z = tl.sum(products, 1)[None, :]
    if SPLITS == 1:
        _finish(
            z, large == 0, rows, block, bias, temperature, row_mask, probs, logits, entropy, loss, raw, loss_weights,
            zero_rows, terms, groups, ticket, B, K, temperature_value, limit, GROUP, BLOCK_K,
        )  # fmt: skip
    else:
        lanes = (rows < B)[:, None] & (k < K)[None, :]
        tl.store(partial + (split * B + rows)[:, None] * K + k[None, :], z, mask=lanes)
        tl.store(large_parts + split * B + rows, large, mask=rows < B)
        blocks = tl.num_programs(0)
        if arrive_last(ticket + 1 + tl.cdiv(blocks, GROUP) + block, SPLITS):
            z = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
            large = tl.zeros((BLOCK_B,), tl.int32)
            for part in range(SPLITS):
                at = partial + (part * B + rows)[:, None] * K + k[None, :]
                z += tl.load(at, mask=lanes, other=0.0, cache_modifier=".cg")
                own = tl.load(large_parts + part * B + rows, mask=rows < B, other=0, cache_modifier=".cg")
                large = tl.maximum(large, own)
            _finish(
                z, large == 0, rows, block, bias, temperature, row_mask, probs, logits, entropy, loss, raw,
                loss_weights, zero_rows, terms, groups, ticket, B, K, temperature_value, limit, GROUP, BLOCK_K,
            )  # fmt: skip


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def route_experts_fwd(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    pooling: int,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    clamp: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """The raw operator ``memkern::route_experts_fwd_triton``."""
    rows, slots, width = hiddens.shape
    experts, f = weight.shape[0], torch.float32
    weight = weight.contiguous()

    def new(*shape: int, dtype: torch.dtype = f) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hiddens.device)

    attention = pooling == 2
    probs, logits, entropy, loss = new(rows, experts, dtype=hiddens.dtype), new(rows, experts), new(rows), new()
    saved = new(saved_size(rows, slots, width, experts, pooling) if save else 0)
    outputs = probs, logits, entropy, loss, saved
    if rows == 0:
        loss.zero_()
        saved.zero_()
        return outputs
    raw, saved_pool, slot_weights, loss_weights, zero_rows = (
        split_saved(saved, rows, slots, width, experts, pooling) if save else (None,) * 5
    )
    low = slots == 1 and slot_mask is None and weight.dtype == hiddens.dtype and weight.dtype != f
    c = row_config(hiddens, experts, pooling, low=low)
    pooled = None
    if attention:
        pooled = saved_pool if save else new(rows, width)
    scores = slot_weights if save else (new(rows, slots) if attention and not c.whole else None)
    split = c.splits > 1
    with on_device(hiddens):
        _forward[(c.blocks, c.splits)](
            hiddens, weight, None if bias is None else bias.contiguous(), temperature,
            None if pool_query is None else pool_query.contiguous(), as_bytes(slot_mask), as_bytes(row_mask),
            probs, logits, entropy, loss,
            raw, saved_pool if not attention else None, scores if attention else None, loss_weights, zero_rows,
            pooled, new(c.splits, rows, experts) if split else None,
            new(c.splits, rows, dtype=torch.int32) if split else None,
            new(c.blocks, 2 * experts + 1), new(group_count(c.blocks), 2 * experts + 1),
            group_tickets(hiddens, c.blocks, c.blocks if split else 0),
            rows, slots, width, experts, *hiddens.stride(), c.split_width, float(temperature_value), float(clamp),
            1 / math.sqrt(max(width, 1)),
            POOLING=pooling, DOT=c.dot, LOW=low and c.dot, SPLITS=c.splits, GROUP=GROUP,
            BLOCK_B=c.block_b, BLOCK_S=c.block_s, BLOCK_D=c.block_d, BLOCK_K=c.block_k,
            WHOLE=c.whole, BLOCK_A=c.block_a, BLOCK_W=c.block_w, **launch_options(c.num_warps),
        )  # fmt: skip
    return outputs
