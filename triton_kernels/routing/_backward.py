"""Backward of route_experts in two launches: the rows, then the weight.

The first goes from the outputs' gradients to that of the raw logits and writes the input's, each element once; the last
program to come adds the bias's and the temperature's over all rows. The second multiplies the raw logits' gradient with
the pooled rows, rows split over programs and added in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import LAUNCH, arrive_last, cast, mdot, on_device
from ._configs import launch_options, row_config, weight_config
from ._forward import as_bytes
from ._pool import slots_taken
from ._saved import split_saved
from ._shared import GROUP, clamp, entropy_slope, finish_sums, group_count, group_tickets, row_softmax


@triton.jit
def _raw_gradient(
    grad_probs, grad_logits, grad_entropy, grad_loss, raw, loss_weights, zero_rows, temperature, row_mask,
    rows, B, K, temperature_value, limit, BOUNDED: tl.constexpr, THROUGH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw logits (BLOCK_B, BLOCK_K), and the rows' shares of the temperature's."""
    k = tl.arange(0, BLOCK_K)[None, :]
    valid = rows < B
    lanes = valid[:, None] & (k < K)
    at = rows[:, None] * K + k
    z = tl.load(raw + at, mask=lanes, other=0.0)
    dz = tl.zeros(z.shape, tl.float32)
    share = tl.sum(dz, 1)
    # A zero row's probabilities are constants. Where no gradient comes, none goes: a masked row may hold NaN.
    alive = valid & (tl.load(zero_rows + rows, mask=valid, other=1) == 0)
    if grad_probs is None and grad_entropy is None and row_mask is not None:
        alive = alive & (tl.load(row_mask + rows, mask=valid, other=0) != 0)
    if grad_probs is not None or grad_entropy is not None or grad_loss is not None:
        t = temperature_value
        if temperature is not None:
            t = tl.load(temperature).to(tl.float32)
        clamped = clamp(z, limit)
        p, top = row_softmax(clamped, k, K, t)
        g = tl.zeros(z.shape, tl.float32)
        if grad_probs is not None:
            g += tl.load(grad_probs + at, mask=lanes, other=0.0).to(tl.float32)
        if grad_entropy is not None:
            g += entropy_slope(p) * tl.load(grad_entropy + rows, mask=valid, other=0.0)[:, None]
        if grad_loss is not None:
            load = tl.load(loss_weights + k, mask=k < K, other=0.0) * tl.load(grad_loss)
            if row_mask is not None:
                counted = tl.load(row_mask + rows, mask=valid, other=0) != 0
                g += tl.where(counted[:, None], load, 0.0)
            else:
                g += load
        dz = p * (g - tl.sum(p * g, 1)[:, None]) / t
        dz = tl.where(alive[:, None] & (k < K), dz, 0.0)
        share = -tl.sum(tl.where(dz == 0, 0.0, dz * (clamped - top[:, None])), 1) / t
    if grad_logits is not None:
        dz += tl.load(grad_logits + at, mask=lanes, other=0.0)
    if BOUNDED:
        if THROUGH:
            dz = tl.where(tl.abs(z) < float("inf"), dz, 0.0)
        else:
            dz = tl.where(tl.abs(z) <= limit, dz, 0.0)
    return tl.where(lanes, dz, 0.0), share


@triton.jit
def _attention_rows(
    hiddens, query, slot_mask, saved_pool, slot_weights, d_pool, d_hiddens, query_parts, row, root, S, D,
    stride_b, stride_s, stride_d, WHOLE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dx_s = w_s dp + c_s q / sqrt(D) with c_s = w_s (x_s - pooled) . dp, and the row's sum of c_s x_s / sqrt(D)."""
    base = hiddens + row * stride_b
    d = tl.arange(0, BLOCK_W)
    columns = d < D
    if WHOLE:
        dp = tl.load(d_pool + row * D + d, mask=columns, other=0.0)
        y = tl.load(saved_pool + row * D + d, mask=columns, other=0.0)
        q = tl.load(query + d, mask=columns, other=0.0).to(tl.float32)
        d_query = tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, S, BLOCK_A):
        s = start + tl.arange(0, BLOCK_A)
        taken = slots_taken(slot_mask, row, s, S)
        weight = tl.load(slot_weights + row * S + s, mask=taken, other=0.0)
        at = base + s.to(tl.int64)[:, None] * stride_s
        out = (row * S + s)[:, None] * D
        if WHOLE:
            lanes = taken[:, None] & columns[None, :]
            x = tl.load(at + d[None, :] * stride_d, mask=lanes, other=0.0).to(tl.float32)
            c = weight * tl.sum((x - y[None, :]) * dp[None, :], 1) * root
            c = tl.where(taken, c, 0.0)
            if d_hiddens is not None:
                dx = tl.where(taken[:, None], weight[:, None] * dp[None, :] + c[:, None] * q[None, :], 0.0)
                tl.store(
                    d_hiddens + out + d[None, :], cast(dx, d_hiddens.dtype.element_ty),
                    mask=(s < S)[:, None] & columns[None, :],
                )  # fmt: skip
            d_query += tl.sum(c[:, None] * x, 0)
        else:
            products = tl.zeros((BLOCK_A, BLOCK_W), tl.float32)
            for first in range(0, D, BLOCK_W):
                e = first + d
                lanes = taken[:, None] & (e < D)[None, :]
                x = tl.load(at + e[None, :] * stride_d, mask=lanes, other=0.0).to(tl.float32)
                y = tl.load(saved_pool + row * D + e, mask=e < D, other=0.0)
                dp = tl.load(d_pool + row * D + e, mask=e < D, other=0.0)
                products += (x - y[None, :]) * dp[None, :]
            c = tl.where(taken, weight * tl.sum(products, 1) * root, 0.0)
            for first in range(0, D, BLOCK_W):
                e = first + d
                lanes = taken[:, None] & (e < D)[None, :]
                dp = tl.load(d_pool + row * D + e, mask=e < D, other=0.0)
                if d_hiddens is not None:
                    q = tl.load(query + e, mask=e < D, other=0.0).to(tl.float32)
                    dx = tl.where(taken[:, None], weight[:, None] * dp[None, :] + c[:, None] * q[None, :], 0.0)
                    tl.store(
                        d_hiddens + out + e[None, :], cast(dx, d_hiddens.dtype.element_ty),
                        mask=(s < S)[:, None] & (e < D)[None, :],
                    )  # fmt: skip
                if query_parts is not None:
                    x = tl.load(at + e[None, :] * stride_d, mask=lanes, other=0.0).to(tl.float32)
                    own = query_parts + row * D + e
                    # Each thread comes back to the elements that it stored itself.
                    before = tl.load(own, mask=(e < D) & (e < start * D), other=0.0)
                    tl.store(own, before + tl.sum(c[:, None] * x, 0), mask=e < D)
    if WHOLE:
        if query_parts is not None:
            tl.store(query_parts + row * D + d, d_query, mask=columns)
    elif query_parts is not None and S == 0:
        for first in range(0, D, BLOCK_W):
            tl.store(query_parts + row * D + first + d, tl.zeros((BLOCK_W,), tl.float32), mask=first + d < D)


@triton.jit
def _backward_rows(
    grad_probs, grad_logits, grad_entropy, grad_loss, hiddens, weight, temperature, query, slot_mask, row_mask,
    raw, saved_pool, slot_weights, loss_weights, zero_rows,
    d_hiddens, d_bias, d_temperature, d_raw, d_pool, query_parts, terms, groups, ticket,
    B, S, D, K, stride_b, stride_s, stride_d, split_width, temperature_value, limit, root,
    POOLING: tl.constexpr, DOT: tl.constexpr, BOUNDED: tl.constexpr, THROUGH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, WHOLE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = block.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    dz, share = _raw_gradient(
        grad_probs, grad_logits, grad_entropy, grad_loss, raw, loss_weights, zero_rows, temperature, row_mask,
        rows, B, K, temperature_value, limit, BOUNDED, THROUGH, BLOCK_K,
    )  # fmt: skip
    first = split * split_width
    last = tl.minimum(first + split_width, D)
    valid = rows < B
    if d_raw is not None:
        # Every split writes the same values, and in the products below reads its own.
        tl.store(d_raw + rows[:, None] * K + k[None, :], dz, mask=valid[:, None] & (k < K)[None, :])
    if d_hiddens is not None or POOLING == 2:
        if not DOT:
            g = tl.sum(dz, 0)
        elif POOLING == 0:
            count = tl.zeros((BLOCK_B,), tl.int32) + S
            if slot_mask is not None:
                count = tl.zeros((BLOCK_B,), tl.int32)
                for s in range(S):
                    count += (tl.load(slot_mask + rows * S + s, mask=valid, other=0) != 0).to(tl.int32)
            scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
        if DOT:
            tl.debug_barrier()
        for start in range(first, last, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = d < last
            if DOT:
                dp = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
                for k0 in range(0, K, BLOCK_E):
                    e = k0 + tl.arange(0, BLOCK_E)
                    at = d_raw + rows[:, None] * K + e[None, :]
                    g = tl.load(at, mask=valid[:, None] & (e < K)[None, :], other=0.0)
                    at_w = weight + e[:, None].to(tl.int64) * D + d[None, :]
                    w = tl.load(at_w, mask=(e < K)[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    dp = mdot(g, w, dp, "ieee")
                lanes = valid[:, None] & inside[None, :]
                if POOLING == 0:
                    dp = dp * scale[:, None]
                else:
                    winner = tl.load(saved_pool + rows[:, None] * D + d[None, :], mask=lanes, other=-1)
                out = d_hiddens + rows[:, None] * S * D + d[None, :]
                for s in range(S):
                    if POOLING == 1:
                        dx = tl.where(winner == s, dp, 0.0)
                    elif slot_mask is not None:
                        taken = tl.load(slot_mask + rows * S + s, mask=valid, other=0) != 0
                        dx = tl.where(taken[:, None], dp, 0.0)
                    else:
                        dx = dp
                    tl.store(out + tl.cast(s, tl.int64) * D, cast(dx, d_hiddens.dtype.element_ty), mask=lanes)
            else:
                at_w = weight + k[:, None].to(tl.int64) * D + d[None, :]
                w = tl.load(at_w, mask=(k < K)[:, None] & inside[None, :], other=0.0).to(tl.float32)
                dp = tl.sum(w * g[:, None], 0)
                if POOLING == 2:
                    tl.store(d_pool + row * D + d, dp, mask=inside)
                elif POOLING == 1:
                    winner = tl.load(saved_pool + row * D + d, mask=inside, other=-1)
                else:
                    count = S
                    if slot_mask is not None:
                        kept = tl.zeros((128,), tl.int32)
                        for s0 in range(0, S, 128):
                            kept += slots_taken(slot_mask, row, s0 + tl.arange(0, 128), S).to(tl.int32)
                        count = tl.sum(kept, 0)
                    dp = dp / tl.maximum(count, 1).to(tl.float32)
                if POOLING != 2:
                    for s0 in range(0, S, BLOCK_S):
                        s = s0 + tl.arange(0, BLOCK_S)
                        lanes = (s < S)[:, None] & inside[None, :]
                        if POOLING == 1:
                            dx = tl.where(winner[None, :] == s[:, None], dp[None, :], 0.0)
                        else:
                            dx = tl.where(slots_taken(slot_mask, row, s, S)[:, None], dp[None, :], 0.0)
                        at = d_hiddens + (row * S + s)[:, None] * D + d[None, :]
                        tl.store(at, cast(dx, d_hiddens.dtype.element_ty), mask=lanes)
        if POOLING == 2:
            tl.debug_barrier()
            _attention_rows(
                hiddens, query, slot_mask, saved_pool, slot_weights, d_pool, d_hiddens, query_parts, row, root, S, D,
                stride_b, stride_s, stride_d, WHOLE, BLOCK_A, BLOCK_W,
            )  # fmt: skip
    if terms is not None:  # noqa: SIM102 - one condition is known when compiling, the other is not
        if split == 0:
            own = terms + row * (K + 1)
            tl.store(own + k, tl.sum(dz, 0), mask=k < K)
            tl.store(own + K, tl.sum(share, 0))
            blocks = tl.num_programs(0)
            finish_sums(terms, groups, ticket, block, blocks, K, d_bias, d_temperature, GROUP, BLOCK_K)


@triton.jit
def _backward_weight(
    d_raw, hiddens, saved_pool, slot_mask, query_parts, d_weight, d_query, partial, query_partial, ticket,
    B, D, K, stride_b, stride_s, stride_d, split_rows,
    POOLING: tl.constexpr, ONE_SLOT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d_weight (K, D) = d_raw^T pooled, and for attention the sum over rows of the query's parts."""
    column, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = d < D
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, B)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    query_total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        rows = r.to(tl.int64)
        valid = r < end
        lanes = valid[:, None] & inside[None, :]
        g = tl.load(d_raw + rows[None, :] * K + k[:, None], mask=valid[None, :] & (k < K)[:, None], other=0.0)
        if ONE_SLOT:
            taken = valid
            if slot_mask is not None:
                taken = valid & (tl.load(slot_mask + rows, mask=valid, other=0) != 0)
            at = hiddens + rows[:, None] * stride_b + d[None, :] * stride_d
            x = tl.load(at, mask=lanes & taken[:, None], other=0.0).to(tl.float32)
        elif POOLING == 1:
            winner = tl.load(saved_pool + rows[:, None] * D + d[None, :], mask=lanes, other=-1)
            at = hiddens + rows[:, None] * stride_b + winner.to(tl.int64) * stride_s + d[None, :] * stride_d
            x = tl.load(at, mask=lanes & (winner >= 0), other=0.0).to(tl.float32)
        else:
            x = tl.load(saved_pool + rows[:, None] * D + d[None, :], mask=lanes, other=0.0)
        total = mdot(g, x, total, "ieee")
        if query_parts is not None and tile == 0:
            query_total += tl.load(query_parts + rows[:, None] * D + d[None, :], mask=lanes, other=0.0)
    lanes = (k < K)[:, None] & inside[None, :]
    at = k[:, None].to(tl.int64) * D + d[None, :]
    q = tl.sum(query_total, 0)
    own = d < tl.where(tile == 0, D, 0)  # the first tile of experts alone sums the query's parts
    if SPLITS == 1:
        tl.store(d_weight + at, cast(total, d_weight.dtype.element_ty), mask=lanes)
        if query_parts is not None:
            tl.store(d_query + d, q, mask=own)
    else:
        size = K.to(tl.int64) * D
        tl.store(partial + split * size + at, total, mask=lanes)
        if query_parts is not None:
            tl.store(query_partial + split * D + d, q, mask=own)
        if arrive_last(ticket + tile * tl.num_programs(0) + column, SPLITS):
            total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
            q = tl.zeros((BLOCK_D,), tl.float32)
            for part in range(SPLITS):
                total += tl.load(partial + part * size + at, mask=lanes, other=0.0, cache_modifier=".cg")
                if query_parts is not None:
                    q += tl.load(query_partial + part * D + d, mask=own, other=0.0, cache_modifier=".cg")
            tl.store(d_weight + at, cast(total, d_weight.dtype.element_ty), mask=lanes)
            if query_parts is not None:
                tl.store(d_query + d, q, mask=own)


def _dense(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()


def route_experts_bwd(
    grad_probs: Tensor | None,
    grad_logits: Tensor | None,
    grad_entropy: Tensor | None,
    grad_loss: Tensor | None,
    hiddens: Tensor,
    weight: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    pooling: int,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    saved: Tensor,
    clamp: float,
    straight_through: bool,
    need_hiddens: bool,
    need_params: bool,
    need_temperature: bool,
) -> tuple[Tensor, ...]:
    """The raw operator ``memkern::route_experts_bwd_triton``."""
    rows, slots, width = hiddens.shape
    experts, f = weight.shape[0], torch.float32
    weight = weight.contiguous()

    def new(*shape: int, dtype: torch.dtype = f) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hiddens.device)

    attention = pooling == 2
    d_hiddens = new(rows, slots, width, dtype=hiddens.dtype) if need_hiddens else new(0, dtype=hiddens.dtype)
    d_weight = new(experts, width, dtype=weight.dtype) if need_params else new(0, dtype=weight.dtype)
    d_bias = new(experts if need_params else 0)
    d_temperature = new() if need_temperature else new(0)
    d_query = new(width if need_params and attention else 0)
    outputs = d_hiddens, d_weight, d_bias, d_temperature, d_query
    if rows == 0:
        for empty in outputs:
            empty.zero_()
        return outputs
    raw, saved_pool, slot_weights, loss_weights, zero_rows = split_saved(saved, rows, slots, width, experts, pooling)
    c = row_config(hiddens, experts, pooling, backward=True)
    # Without a gradient of the input there are no columns to split.
    splits = c.splits if need_hiddens or attention else 1
    sums = need_params or need_temperature
    d_raw = new(rows, experts) if need_params or (need_hiddens and c.dot) else None
    query_parts = new(rows, width) if need_params and attention else None
    with on_device(hiddens):
        _backward_rows[(c.blocks, splits)](
            _dense(grad_probs), _dense(grad_logits), _dense(grad_entropy), grad_loss, hiddens, weight, temperature,
            _dense(pool_query), as_bytes(slot_mask), as_bytes(row_mask),
            raw, saved_pool, slot_weights, loss_weights, zero_rows,
            d_hiddens if need_hiddens else None, d_bias if need_params else None,
            d_temperature if need_temperature else None,
            d_raw, new(rows, width) if attention else None, query_parts,
            new(c.blocks, experts + 1) if sums else None,
            new(group_count(c.blocks), experts + 1) if sums else None,
            group_tickets(hiddens, c.blocks) if sums else None,
            rows, slots, width, experts, *hiddens.stride(), c.split_width, float(temperature_value), float(clamp),
            1 / math.sqrt(max(width, 1)),
            POOLING=pooling, DOT=c.dot, BOUNDED=math.isfinite(clamp), THROUGH=straight_through, GROUP=GROUP,
            BLOCK_B=c.block_b, BLOCK_S=c.block_s, BLOCK_D=c.block_d, BLOCK_K=c.block_k,
            BLOCK_E=16, WHOLE=c.whole, BLOCK_A=c.block_a, BLOCK_W=c.block_w, **launch_options(c.num_warps),
        )  # fmt: skip
        if need_params and width > 0:
            w = weight_config(hiddens, experts, pooling)
            columns, tiles = w.tiles(experts, width)
            split = w.splits > 1
            _backward_weight[(columns, tiles, w.splits)](
                d_raw, hiddens, saved_pool, as_bytes(slot_mask), query_parts, d_weight, d_query,
                new(w.splits, experts, width) if split else None,
                new(w.splits, width) if split and attention else None,
                group_tickets(hiddens, 0, columns * tiles) if split else None,
                rows, width, experts, *hiddens.stride(), w.split_rows,
                POOLING=pooling, ONE_SLOT=slots == 1, SPLITS=w.splits,
                BLOCK_K=w.block_k, BLOCK_D=w.block_d, BLOCK_R=w.block_r, num_warps=w.num_warps, **LAUNCH,
            )  # fmt: skip
    return outputs
