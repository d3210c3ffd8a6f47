"""Gated expert updates in Triton: one launch forward, three backward (a fourth when the gates were not kept).

A row is r = b S + s, R = B S of them. Forward makes both pre-activations of a tile in two accumulators that share the
tile of the left factor; the loop runs over the state's columns and then over the hidden's, so that [M;h] never exists.
On compute capability 9.0 and up, tiles of low precision come and go as bulk tensor copies; other inputs take pointers.

Backward: gradients of the pre-activations lie as (R, K, 2, D); the gradient to the hiddens is one loop over experts,
gate and update in a fixed order; those to weights and biases are loops over the rows. There are no float atomics.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import INTERPRETING, LAUNCH, arrive_last, capability, cast, mdot, on_device, sm_count, tanh, tickets
from .expert_slots import gather_slots_bwd, gather_slots_fwd, scatter_slots_bwd, scatter_slots_fwd

__all__ = [
    "aggregate_experts_bwd",
    "aggregate_experts_fwd",
    "gather_slots_bwd",
    "gather_slots_fwd",
    "scatter_slots_bwd",
    "scatter_slots_fwd",
    "update_experts_bwd",
    "update_experts_fwd",
]

_TILES: dict[str, Any] = json.loads((Path(__file__).parent / "expert_update.json").read_text())


@triton.jit
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which tile this is, in groups of rows whose left factors stay in the cache."""
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def _row_pointers(x, rows, S, batch_stride, slot_stride):
    return x + (rows // S).to(tl.int64) * batch_stride + (rows % S).to(tl.int64) * slot_stride


@triton.jit
def _forward(
    states, hiddens, probs, gate_weight, update_weight, gate_bias, update_bias, row_mask, out, gates, updates,
    states_tile,
    R, S, D, K,
    states_batch, states_expert, states_slot, hiddens_batch, hiddens_slot,
    gate_expert, gate_row, update_expert, update_row,
    BIAS_G: tl.constexpr, BIAS_U: tl.constexpr, MASK: tl.constexpr, SAVE: tl.constexpr, TMA: tl.constexpr,
    DOT: tl.constexpr, IP: tl.constexpr, BATCHES: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: experts x tiles of (R, D). With TMA, tensors of (B, K, S, D) and the weights are descriptors.

    states (B, K, S, D), hiddens (B, S, D), probs (B, K), weights (K, D, 2D), biases (K, D), row_mask (B,) uint8,
    out (B, K, S, D), gates and updates (B, S, K, D); all last strides are 1.
    """
    tiles_m, tiles_n = tl.cdiv(R, BM), tl.cdiv(D, BN)
    k = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    row0, column0 = tile_m * BM, tile_n * BN
    rows, columns = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    in_rows, in_columns = rows < R, columns < D
    z_gate = tl.zeros((BM, BN), tl.float32)
    z_update = tl.zeros((BM, BN), tl.float32)
    if TMA:
        batch0, slot0 = row0 // S, row0 % S
        for c in range(0, D, BK):
            # What the weights' tile holds past the state's columns meets zeros of the state's.
            x = states.load([batch0, k, slot0, c]).reshape(BM, BK)
            z_gate = mdot(x, gate_weight.load([k, column0, c]).reshape(BN, BK).T, z_gate, IP)
            z_update = mdot(x, update_weight.load([k, column0, c]).reshape(BN, BK).T, z_update, IP)
        for c in range(0, D, BK):
            x = hiddens.load([row0, c])
            z_gate = mdot(x, gate_weight.load([k, column0, D + c]).reshape(BN, BK).T, z_gate, IP)
            z_update = mdot(x, update_weight.load([k, column0, D + c]).reshape(BN, BK).T, z_update, IP)
    else:
        depth = tl.arange(0, BK)
        m_rows = _row_pointers(states, rows, S, states_batch, states_slot) + k.to(tl.int64) * states_expert
        h_rows = _row_pointers(hiddens, rows, S, hiddens_batch, hiddens_slot)
        g_rows = gate_weight + k.to(tl.int64) * gate_expert + columns.to(tl.int64) * gate_row
        u_rows = update_weight + k.to(tl.int64) * update_expert + columns.to(tl.int64) * update_row
        for c in range(0, D, BK):
            deep = c + depth < D
            x = tl.load(m_rows[:, None] + (c + depth)[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
            inside = deep[:, None] & in_columns[None, :]
            w = tl.load(g_rows[None, :] + (c + depth)[:, None], mask=inside, other=0.0)
            z_gate = mdot(x.to(DOT), w.to(DOT), z_gate, IP)
            w = tl.load(u_rows[None, :] + (c + depth)[:, None], mask=inside, other=0.0)
            z_update = mdot(x.to(DOT), w.to(DOT), z_update, IP)
        for c in range(0, D, BK):
            deep = c + depth < D
            x = tl.load(h_rows[:, None] + (c + depth)[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
            inside = deep[:, None] & in_columns[None, :]
            w = tl.load(g_rows[None, :] + (D + c + depth)[:, None], mask=inside, other=0.0)
            z_gate = mdot(x.to(DOT), w.to(DOT), z_gate, IP)
            w = tl.load(u_rows[None, :] + (D + c + depth)[:, None], mask=inside, other=0.0)
            z_update = mdot(x.to(DOT), w.to(DOT), z_update, IP)
    bias_at = k.to(tl.int64) * D + columns
    if BIAS_G:
        z_gate += tl.load(gate_bias + bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if BIAS_U:
        z_update += tl.load(update_bias + bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    g = 1.0 / (1.0 + tl.exp(-z_gate))
    u = tanh(z_update)
    p = tl.load(probs + (rows // S).to(tl.int64) * K + k, mask=in_rows, other=0.0).to(tl.float32)
    keep = p == 0.0
    if MASK:
        keep = keep | (tl.load(row_mask + rows // S, mask=in_rows, other=0) == 0)
    if TMA:
        stored = states_tile.load([batch0, k, slot0, column0]).reshape(BM, BN)
    else:
        inside = in_rows[:, None] & in_columns[None, :]
        stored = tl.load(m_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    m = stored.to(tl.float32)
    a = p[:, None] * g
    mixed = tl.where(keep[:, None], m, a * u + (1.0 - a) * m)
    if TMA:
        out.store([batch0, k, slot0, column0], cast(mixed, out.dtype).reshape(BATCHES, 1, SLOTS, BN))
        if SAVE:
            gates.store([row0, k, column0], cast(g, gates.dtype).reshape(BM, 1, BN))
            updates.store([row0, k, column0], cast(u, updates.dtype).reshape(BM, 1, BN))
    else:
        at = ((rows // S).to(tl.int64) * K + k) * S + rows % S
        tl.store(out + at[:, None] * D + columns[None, :], cast(mixed, out.dtype.element_ty), mask=inside)
        if SAVE:
            at = rows.to(tl.int64) * K + k
            tl.store(gates + at[:, None] * D + columns[None, :], cast(g, gates.dtype.element_ty), mask=inside)
            tl.store(updates + at[:, None] * D + columns[None, :], cast(u, updates.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward(
    grad, states, probs, gates, updates, row_mask, d_products, d_probs, partials, ticket,
    S, D, K, chunks,
    grad_batch, grad_expert, grad_slot, states_batch, states_expert, states_slot,
    MASK: tl.constexpr, PROBS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: (B K, chunks of S). d_products (R, K, 2, D): gradients of the gate's and the update's pre-activations."""
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, k = pair // K, pair % K
    p = tl.load(probs + pair).to(tl.float32)
    per_chunk = tl.cdiv(S, chunks)
    first, last = chunk * per_chunk, tl.minimum(S, (chunk + 1) * per_chunk)
    seen = last
    if MASK:
        # Of a row that is masked nothing is read, and its gradients are zero.
        masked = tl.load(row_mask + b) == 0
        seen, p = tl.where(masked, 0, last), tl.where(masked, 0.0, p)
    total = tl.zeros((BS,), tl.float32)
    for s0 in range(first, last, BS):
        s = (s0 + tl.arange(0, BS)).to(tl.int64)
        grad_rows = grad + b * grad_batch + k * grad_expert + s * grad_slot
        state_rows = states + b * states_batch + k * states_expert + s * states_slot
        saved = ((b * S + s) * K + k) * D
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            inside = (s < last)[:, None] & (d < D)[None, :]
            known = (s < seen)[:, None] & (d < D)[None, :]
            dm = tl.load(grad_rows[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
            m = tl.load(state_rows[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
            g = tl.load(gates + saved[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
            u = tl.load(updates + saved[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
            da = dm * (u - m)
            total += tl.sum(da * g, 1)
            at = d_products + 2 * saved[:, None] + d[None, :]
            tl.store(at, cast(p * da * (g * (1.0 - g)), d_products.dtype.element_ty), mask=inside)
            tl.store(at + D, cast(p * (dm * g) * (1.0 - u * u), d_products.dtype.element_ty), mask=inside)
    if PROBS:
        if CHUNKS == 1:
            tl.store(d_probs + pair, tl.sum(total))
        else:
            tl.store(partials + pair * chunks + chunk, tl.sum(total))
            if arrive_last(ticket + pair, chunks):
                each = tl.arange(0, CHUNKS)
                tl.store(
                    d_probs + pair, tl.sum(tl.load(partials + pair * chunks + each, mask=each < chunks, other=0.0))
                )


@triton.jit
def _inputs_backward(
    d_products, gate_weight, update_weight, grad, probs, gates, row_mask, d_states, d_hiddens,
    R, S, D, K, shared,
    grad_batch, grad_expert, grad_slot, gate_expert, gate_row, update_expert, update_row,
    MASK: tl.constexpr, DOT: tl.constexpr, IP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: ``shared`` tiles of d_hiddens (all of them or none), which take K times as long, then those of d_states."""
    tiles_m, tiles_n = tl.cdiv(R, BM), tl.cdiv(D, BN)
    pid = tl.program_id(0)
    of_hiddens = pid < shared
    own = tl.where(of_hiddens, pid, pid - shared)
    expert = own // (tiles_m * tiles_n)
    tile_m, tile_n = _tile(own % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    in_rows, in_columns = rows < R, columns < D
    half = tl.where(of_hiddens, D, 0)
    first, last = tl.where(of_hiddens, 0, expert), tl.where(of_hiddens, K, expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    z_rows = d_products + (rows.to(tl.int64) * K + first) * 2 * D
    gate_columns = gate_weight + first.to(tl.int64) * gate_expert + half + columns
    update_columns = update_weight + first.to(tl.int64) * update_expert + half + columns
    for _ in range(first, last):
        for c in range(0, D, BK):
            deep = c + depth < D
            z = tl.load(z_rows[:, None] + (c + depth)[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
            at = gate_columns[None, :] + (c + depth).to(tl.int64)[:, None] * gate_row
            w = tl.load(at, mask=deep[:, None] & in_columns[None, :], other=0.0)
            acc = mdot(z.to(DOT), w.to(DOT), acc, IP)
        z_rows += D
        for c in range(0, D, BK):
            deep = c + depth < D
            z = tl.load(z_rows[:, None] + (c + depth)[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
            at = update_columns[None, :] + (c + depth).to(tl.int64)[:, None] * update_row
            w = tl.load(at, mask=deep[:, None] & in_columns[None, :], other=0.0)
            acc = mdot(z.to(DOT), w.to(DOT), acc, IP)
        z_rows += D
        gate_columns += gate_expert
        update_columns += update_expert
    inside = in_rows[:, None] & in_columns[None, :]
    if of_hiddens:
        to = d_hiddens + rows.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(to, cast(acc, d_hiddens.dtype.element_ty), mask=inside)
    else:
        b = (rows // S).to(tl.int64)
        p = tl.load(probs + b * K + expert, mask=in_rows, other=0.0).to(tl.float32)
        grad_rows = _row_pointers(grad, rows, S, grad_batch, grad_slot) + expert.to(tl.int64) * grad_expert
        dm = tl.load(grad_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        saved = (rows.to(tl.int64) * K + expert) * D
        g = tl.load(gates + saved[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        d_state = dm * (1.0 - p[:, None] * g) + acc
        if MASK:
            kept = tl.load(row_mask + b, mask=in_rows, other=0) == 0
            d_state = tl.where(kept[:, None], dm, d_state)
        to_rows = d_states + ((b * K + expert) * S + rows % S) * D
        tl.store(to_rows[:, None] + columns[None, :], cast(d_state, d_states.dtype.element_ty), mask=inside)


@triton.jit
def _weights_backward(
    d_products, states, hiddens, row_mask, d_gate_weight, d_update_weight, d_gate_bias, d_update_bias,
    R, S, D, K,
    states_batch, states_expert, states_slot, hiddens_batch, hiddens_slot,
    MASK: tl.constexpr, DOT: tl.constexpr, IP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: (experts x gate, update) x tiles of (D, D + D): rows of a weight, columns of one half of it."""
    tiles_m, tiles_n = tl.cdiv(D, BM), tl.cdiv(D, BN)
    pid = tl.program_id(0)
    which = pid // (tiles_m * 2 * tiles_n)
    k, of_update = which // 2, which % 2
    tile_m, tile_n = pid // (2 * tiles_n) % tiles_m, pid % (2 * tiles_n)
    of_hiddens = tile_n >= tiles_n
    tile_n = tile_n % tiles_n
    outs, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    in_outs, in_columns = outs < D, columns < D
    z_columns = d_products + k.to(tl.int64) * 2 * D + of_update * D + outs
    acc = tl.zeros((BM, BN), tl.float32)
    if of_hiddens:
        for r0 in range(0, R, BK):
            rows = r0 + depth
            z = tl.load(
                z_columns[None, :] + rows.to(tl.int64)[:, None] * (2 * K * D),
                mask=(rows < R)[:, None] & in_outs[None, :],
                other=0.0,
            )
            taken = rows < R
            if MASK:
                taken = taken & (tl.load(row_mask + rows // S, mask=taken, other=0) != 0)
            x_rows = _row_pointers(hiddens, rows, S, hiddens_batch, hiddens_slot)
            x = tl.load(x_rows[:, None] + columns[None, :], mask=taken[:, None] & in_columns[None, :], other=0.0)
            acc = mdot(z.to(DOT).T, x.to(DOT), acc, IP)
    else:
        for r0 in range(0, R, BK):
            rows = r0 + depth
            z = tl.load(
                z_columns[None, :] + rows.to(tl.int64)[:, None] * (2 * K * D),
                mask=(rows < R)[:, None] & in_outs[None, :],
                other=0.0,
            )
            taken = rows < R
            if MASK:
                taken = taken & (tl.load(row_mask + rows // S, mask=taken, other=0) != 0)
            x_rows = _row_pointers(states, rows, S, states_batch, states_slot) + k.to(tl.int64) * states_expert
            x = tl.load(x_rows[:, None] + columns[None, :], mask=taken[:, None] & in_columns[None, :], other=0.0)
            acc = mdot(z.to(DOT).T, x.to(DOT), acc, IP)
    at = (k.to(tl.int64) * D + outs)[:, None] * (2 * D) + tl.where(of_hiddens, D, 0) + columns[None, :]
    inside = in_outs[:, None] & in_columns[None, :]
    if of_update:
        tl.store(d_update_weight + at, cast(acc, d_update_weight.dtype.element_ty), mask=inside)
    else:
        tl.store(d_gate_weight + at, cast(acc, d_gate_weight.dtype.element_ty), mask=inside)
    if (tile_n == 0) & (of_hiddens == 0):
        total = tl.zeros((BM,), tl.float32)
        for r0 in range(0, R, BK):
            rows = r0 + depth
            z = tl.load(
                z_columns[None, :] + rows.to(tl.int64)[:, None] * (2 * K * D),
                mask=(rows < R)[:, None] & in_outs[None, :],
                other=0.0,
            )
            total += tl.sum(z.to(tl.float32), 0)
        if of_update:
            tl.store(d_update_bias + k.to(tl.int64) * D + outs, total, mask=in_outs)
        else:
            tl.store(d_gate_bias + k.to(tl.int64) * D + outs, total, mask=in_outs)


@triton.jit
def _aggregate_forward(
    states, probs, out, S, D, K, states_batch, states_expert, states_slot, BD: tl.constexpr
):  # fmt: skip
    """Grid: (R, blocks of D)."""
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    at = states + b * states_batch + s * states_slot + d
    total = tl.zeros((BD,), tl.float32)
    for k in range(K):
        p = tl.load(probs + b * K + k).to(tl.float32)
        total += p * tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        at += states_expert
    tl.store(out + row * D + d, cast(total, out.dtype.element_ty), mask=d < D)


@triton.jit
def _aggregate_backward(
    grad, states, probs, d_states, d_probs, S, D, K,
    grad_batch, grad_slot, states_batch, states_expert, states_slot,
    STATES: tl.constexpr, PROBS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (B K,)."""
    pair = tl.program_id(0).to(tl.int64)
    b, k = pair // K, pair % K
    p = tl.load(probs + pair).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    grad_row = grad + b * grad_batch
    state_row = states + b * states_batch + k * states_expert
    to_row = d_states + pair * S * D
    for _ in range(S):
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = tl.load(grad_row + d, mask=d < D, other=0.0).to(tl.float32)
            if PROBS:
                total += x * tl.load(state_row + d, mask=d < D, other=0.0).to(tl.float32)
            if STATES:
                tl.store(to_row + d, cast(p * x, d_states.dtype.element_ty), mask=d < D)
        grad_row += grad_slot
        state_row += states_slot
        to_row += D
    if PROBS:
        tl.store(d_probs + pair, tl.sum(total))


def _row(x: Tensor) -> Tensor:
    """``x`` with stride 1 along the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask(row_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as bytes; any tensor where there is none."""
    return like if row_mask is None else row_mask.contiguous().view(torch.uint8)


_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _product(states: Tensor, hiddens: Tensor, gate_weight: Tensor, update_weight: Tensor) -> tuple[torch.dtype, str]:
    """In which dtype the products run, and how float32 is multiplied: as torch's own switch for TF32 says."""
    same = all(t.dtype == states.dtype for t in (hiddens, gate_weight, update_weight))
    dtype = states.dtype if same else torch.float32
    tf32 = dtype == torch.float32 and not INTERPRETING and torch.backends.cuda.matmul.allow_tf32
    return dtype, "tf32" if tf32 else "ieee"


def _tile_of(kind: str, programs: Callable[[list[int]], int], sms: int) -> list[int]:
    """The first tile of this kind that gives every multiprocessor a program, else the last."""
    tiles = _TILES["interpreted" if INTERPRETING else kind]
    return next((tile for tile in tiles if programs(tile) >= sms), tiles[-1])  # type: ignore[no-any-return]


def _kind(product: str, dtype: torch.dtype, *tensors: Tensor) -> str:
    """Which list of tiles: rows that 16-byte loads cannot take need more registers, and so smaller tiles."""
    if dtype == torch.float32:
        return f"{product}_full"
    aligned = all(stride * t.element_size() % 16 == 0 for t in tensors for stride in t.stride()[:-1])
    return f"{product}_low" if aligned else f"{product}_odd"


def _bulk_copies(tensors: tuple[Tensor, ...], slots: int, tile: list[int]) -> bool:
    """Whether these tensors and this tile can move as bulk tensor copies: alignment, and tiles of whole boxes."""
    if slots % tile[0] and tile[0] % slots:
        return False
    for t in tensors:
        if t.data_ptr() % 16 or any(stride * t.element_size() % 16 for stride in t.stride()[:-1]):
            return False
        if any(stride <= 0 or stride >= 1 << 40 for stride in t.stride()):
            return False
    return True


def update_experts_fwd(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, experts, slots, width = states.shape
    dtype, precision = _product(states, hiddens, gate_weight, update_weight)
    kept = (batch, slots, experts, width) if save else (0,)
    out = states.new_empty(states.shape)
    gates, updates = (states.new_empty(kept, dtype=dtype) for _ in range(2))
    if out.numel() == 0:
        return out, gates, updates
    states, hiddens, probs = _row(states), _row(hiddens), probs.contiguous()
    gate_weight, update_weight = _row(gate_weight), _row(update_weight)
    rows, sms = batch * slots, sm_count(states.device)
    full = dtype == torch.float32

    def programs(tile: list[int]) -> int:
        return experts * triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1])

    arch = capability(states.device)
    tile = _tile_of("forward_full" if full else "forward_bulk_100" if arch >= 100 else "forward_bulk", programs, sms)
    tma = (
        not full
        and arch >= 90
        and hiddens.is_contiguous()
        and _bulk_copies((states, hiddens, gate_weight, update_weight, out), slots, tile)
    )
    if not full and not tma:
        tile = _tile_of(_kind("forward", dtype, states, hiddens, gate_weight, update_weight), programs, sms)
    bm, bn, bk, warps, stages = tile
    boxes = (max(1, bm // slots), min(bm, slots))
    given: tuple[Any, ...] = (states, hiddens, probs, gate_weight, update_weight)
    made: tuple[Any, ...] = (out, gates, updates, states)
    if tma:
        given = (
            TensorDescriptor.from_tensor(states, [boxes[0], 1, boxes[1], bk]),
            TensorDescriptor.from_tensor(hiddens.view(rows, width), [bm, bk]),
            probs,
            TensorDescriptor.from_tensor(gate_weight, [1, bn, bk]),
            TensorDescriptor.from_tensor(update_weight, [1, bn, bk]),
        )
        saved = [
            TensorDescriptor.from_tensor(t.view(rows, experts, width), [bm, 1, bn]) if save else t
            for t in (gates, updates)
        ]
        tile_box = [boxes[0], 1, boxes[1], bn]
        made = (
            TensorDescriptor.from_tensor(out, tile_box),
            *saved,
            TensorDescriptor.from_tensor(states, tile_box),
        )
    grid = (experts * triton.cdiv(rows, bm) * triton.cdiv(width, bn),)
    with on_device(states):
        _forward[grid](
            *given,
            probs if gate_bias is None else gate_bias.contiguous(),
            probs if update_bias is None else update_bias.contiguous(),
            _mask(row_mask, probs),
            *made,
            rows, slots, width, experts,
            *states.stride()[:3], *hiddens.stride()[:2], *gate_weight.stride()[:2], *update_weight.stride()[:2],
            BIAS_G=gate_bias is not None, BIAS_U=update_bias is not None, MASK=row_mask is not None, SAVE=save,
            TMA=tma, DOT=_TL[dtype], IP=precision, BATCHES=boxes[0], SLOTS=boxes[1],
            BM=bm, BN=bn, BK=bk, GROUP=8, num_warps=warps, num_stages=stages, **LAUNCH,
        )  # fmt: skip
    return out, gates, updates


def update_experts_bwd(
    grad: Tensor,
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    gates: Tensor,
    updates: Tensor,
    need_states: bool,
    need_hiddens: bool,
    need_probs: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    batch, experts, slots, width = states.shape
    dtype, precision = _product(states, hiddens, gate_weight, update_weight)
    f = torch.float32
    d_states = states.new_empty(states.shape if need_states else (0,))
    d_hiddens = hiddens.new_empty(hiddens.shape if need_hiddens else (0,))
    d_probs = probs.new_empty(probs.shape if need_probs else (0,), dtype=f)
    d_weights = [w.new_empty(w.shape if need_params else (0,)) for w in (gate_weight, update_weight)]
    d_biases = [w.new_empty((experts, width) if need_params else (0,), dtype=f) for w in (gate_weight, update_weight)]
    found = (d_states, d_hiddens, d_probs, d_weights[0], d_biases[0], d_weights[1], d_biases[1])
    if states.numel() == 0:
        for made in found:
            made.zero_()
        return found
    if gates.numel() == 0:
        inputs = (states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias, row_mask)
        _, gates, updates = update_experts_fwd(*inputs, True)
    grad, states, hiddens, probs = _row(grad), _row(states), _row(hiddens), probs.contiguous()
    gate_weight, update_weight = _row(gate_weight), _row(update_weight)
    mask, masked = _mask(row_mask, probs), row_mask is not None
    rows, pairs = batch * slots, batch * experts
    d_products = states.new_empty((rows, experts, 2, width), dtype=dtype)
    sms = sm_count(states.device)
    chunks = min(64, triton.cdiv(slots, 4), triton.cdiv(2 * sms, pairs))
    partials = states.new_empty((pairs, chunks) if chunks > 1 else (1,), dtype=f)
    with on_device(states):
        _mix_backward[(pairs, chunks)](
            grad, states, probs, gates, updates, mask, d_products, d_probs if need_probs else partials, partials,
            tickets(states.device, pairs) if chunks > 1 else partials,
            slots, width, experts, chunks, *grad.stride()[:3], *states.stride()[:3],
            MASK=masked, PROBS=need_probs, BS=4, BD=min(512, triton.next_power_of_2(width)),
            CHUNKS=triton.next_power_of_2(chunks), num_warps=4, **LAUNCH,
        )  # fmt: skip
        if need_states or need_hiddens:
            kind = _kind("inputs", dtype, d_products, gate_weight, update_weight, grad, gates)
            bm, bn, bk, warps, stages = _tile_of(
                kind, lambda tile: experts * triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1]), sms
            )
            tiles = triton.cdiv(rows, bm) * triton.cdiv(width, bn)
            shared = tiles if need_hiddens else 0
            _inputs_backward[(shared + (experts * tiles if need_states else 0),)](
                d_products, gate_weight, update_weight, grad, probs, gates, mask,
                d_states if need_states else grad, d_hiddens if need_hiddens else hiddens,
                rows, slots, width, experts, shared,
                *grad.stride()[:3], *gate_weight.stride()[:2], *update_weight.stride()[:2],
                MASK=masked, DOT=_TL[dtype], IP=precision,
                BM=bm, BN=bn, BK=bk, GROUP=8, num_warps=warps, num_stages=stages, **LAUNCH,
            )  # fmt: skip
        if need_params:
            kind = _kind("weights", dtype, d_products, states, hiddens)
            bm, bn, bk, warps, stages = _tile_of(
                kind, lambda tile: 4 * experts * triton.cdiv(width, tile[0]) * triton.cdiv(width, tile[1]), sms
            )
            _weights_backward[(experts * 2 * triton.cdiv(width, bm) * 2 * triton.cdiv(width, bn),)](
                d_products, states, hiddens, mask, *d_weights, *d_biases,
                rows, slots, width, experts, *states.stride()[:3], *hiddens.stride()[:2],
                MASK=masked, DOT=_TL[dtype], IP=precision,
                BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages, **LAUNCH,
            )  # fmt: skip
    return found


def aggregate_experts_fwd(states: Tensor, probs: Tensor) -> Tensor:
    batch, experts, slots, width = states.shape
    states, probs = _row(states), probs.contiguous()
    out = states.new_empty((batch, slots, width))
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        with on_device(states):
            _aggregate_forward[(batch * slots, triton.cdiv(width, block))](
                states, probs, out, slots, width, experts, *states.stride()[:3], BD=block, num_warps=4, **LAUNCH
            )
    return out


def aggregate_experts_bwd(
    grad: Tensor, states: Tensor, probs: Tensor, need_states: bool, need_probs: bool
) -> tuple[Tensor, Tensor]:
    batch, experts, slots, width = states.shape
    grad, states, probs = _row(grad), _row(states), probs.contiguous()
    d_states = states.new_empty(states.shape if need_states else (0,))
    d_probs = probs.new_empty(probs.shape if need_probs else (0,), dtype=torch.float32)
    if batch * experts and (need_states or need_probs):
        with on_device(states):
            _aggregate_backward[(batch * experts,)](
                grad, states, probs, d_states, d_probs, slots, width, experts,
                *grad.stride()[:2], *states.stride()[:3],
                STATES=need_states, PROBS=need_probs, BD=min(1024, triton.next_power_of_2(max(1, width))),
                num_warps=4, **LAUNCH,
            )  # fmt: skip
    return d_states, d_probs
