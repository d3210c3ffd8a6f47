"""Slots of a token sequence in Triton: means of the rows with a slot's id, and rows replaced by slots.

Ids are compared as int64. Rows are summed in the order of their positions, by the one program that owns the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LAUNCH, cast, on_device

_TOKENS = 16
_NEVER = tl.constexpr(1 << 30)


@triton.jit
def _slot_sums(
    x, input_ids, slot_ids, out, T, S, D, x_batch, x_token, MEAN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Grid: (B S, blocks of D). x (B, T, D) -> out (B, S, D): means by id, or sums for the first of equal slots."""
    pair = tl.program_id(0).to(tl.int64)
    b, slot = pair // S, (pair % S).to(tl.int32)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    id = tl.load(slot_ids + slot)
    total = tl.zeros((BD,), tl.float32)
    count = 0
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        match = (tl.load(input_ids + b * T + t, mask=t < T, other=0) == id) & (t < T)
        rows = x + b * x_batch + t.to(tl.int64) * x_token
        values = tl.load(rows[:, None] + d[None, :], mask=match[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
        count += tl.sum(match.to(tl.int32))
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)
    else:
        repeated = 0
        for s in range(slot):
            repeated += (tl.load(slot_ids + s) == id).to(tl.int32)
        total = tl.where(repeated > 0, 0.0, total)
    tl.store(out + pair * D + d, cast(total, out.dtype.element_ty), mask=d < D)


@triton.jit
def _gather_backward(
    grad, input_ids, slot_ids, out, T, S, D, grad_batch, grad_slot, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Grid: (B blocks of T, blocks of D). grad (B, S, D) -> out (B, T, D)."""
    blocks = tl.cdiv(T, BT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    ids = tl.load(input_ids + b * T + t, mask=t < T, other=0)
    total = tl.zeros((BT, BD), tl.float32)
    row = grad + b * grad_batch
    for slot in range(S):
        id = tl.load(slot_ids + slot)
        match = (ids == id) & (t < T)
        if tl.sum(match.to(tl.int32)) > 0:
            count = 0
            for t0 in range(0, T, 256):
                others = t0 + tl.arange(0, 256)
                same = tl.load(input_ids + b * T + others, mask=others < T, other=0) == id
                count += tl.sum((same & (others < T)).to(tl.int32))
            share = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32) / count.to(tl.float32)
            total += tl.where(match[:, None], share[None, :], 0.0)
        row += grad_slot
    at = out + (b * T + t)[:, None] * D + d[None, :]
    tl.store(at, cast(total, out.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def _splice(
    sequence, slots, input_ids, slot_ids, out, T, S, D, sequence_batch, sequence_token, slots_batch, slots_slot,
    VALUES: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (B blocks of T, blocks of D). Rows whose id is a slot's become that slot, or zero without VALUES."""
    blocks = tl.cdiv(T, BT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    ids = tl.load(input_ids + b * T + t, mask=t < T, other=0)
    slot = tl.full((BT,), _NEVER, tl.int32)
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        match = (ids[:, None] == tl.load(slot_ids + s, mask=s < S, other=0)[None, :]) & (s < S)[None, :]
        slot = tl.minimum(slot, tl.min(tl.where(match, s[None, :], _NEVER), 1))
    hit = slot < _NEVER
    inside = (t < T)[:, None] & (d < D)[None, :]
    from_sequence = sequence + b * sequence_batch + t.to(tl.int64) * sequence_token
    row = tl.load(from_sequence[:, None] + d[None, :], mask=inside & (hit == 0)[:, None], other=0.0).to(tl.float32)
    if VALUES:
        from_slots = slots + b * slots_batch + tl.where(hit, slot, 0).to(tl.int64) * slots_slot
        value = tl.load(from_slots[:, None] + d[None, :], mask=inside & hit[:, None], other=0.0).to(tl.float32)
        row = tl.where(hit[:, None], value, row)
    tl.store(out + (b * T + t)[:, None] * D + d[None, :], cast(row, out.dtype.element_ty), mask=inside)


def _row(x: Tensor) -> Tensor:
    """``x`` with stride 1 along the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(width: int, most: int) -> int:
    return min(most, triton.next_power_of_2(max(1, width)))


def _sums(x: Tensor, input_ids: Tensor, slot_ids: Tensor, dtype: torch.dtype, mean: bool) -> Tensor:
    x, input_ids, slot_ids = _row(x), input_ids.contiguous(), slot_ids.contiguous()
    batch, tokens, width = x.shape
    slots = slot_ids.shape[0]
    out = x.new_empty((batch, slots, width), dtype=dtype)
    if out.numel():
        block = _block(width, 256)
        with on_device(x):
            _slot_sums[(batch * slots, triton.cdiv(width, block))](
                x, input_ids, slot_ids, out, tokens, slots, width, *x.stride()[:2],
                MEAN=mean, BT=_TOKENS, BD=block, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return out


def gather_slots_fwd(hiddens: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    return _sums(hiddens, input_ids, slot_ids, hiddens.dtype, True)


def gather_slots_bwd(grad: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    grad, input_ids, slot_ids = _row(grad), input_ids.contiguous(), slot_ids.contiguous()
    batch, tokens = input_ids.shape
    slots, width = grad.shape[1:]
    out = grad.new_empty((batch, tokens, width))
    if out.numel():
        block = _block(width, 256)
        with on_device(grad):
            _gather_backward[(batch * triton.cdiv(tokens, _TOKENS), triton.cdiv(width, block))](
                grad, input_ids, slot_ids, out, tokens, slots, width, *grad.stride()[:2],
                BT=_TOKENS, BD=block, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return out


def _spliced(sequence: Tensor, slots: Tensor | None, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    sequence, input_ids, slot_ids = _row(sequence), input_ids.contiguous(), slot_ids.contiguous()
    values = sequence if slots is None else _row(slots)
    batch, tokens, width = sequence.shape
    out = sequence.new_empty(sequence.shape)
    if out.numel():
        block = _block(width, 256)
        with on_device(sequence):
            _splice[(batch * triton.cdiv(tokens, _TOKENS), triton.cdiv(width, block))](
                sequence, values, input_ids, slot_ids, out, tokens, slot_ids.shape[0], width,
                *sequence.stride()[:2], *values.stride()[:2],
                VALUES=slots is not None, BT=_TOKENS, BS=_block(slot_ids.shape[0], 64), BD=block,
                num_warps=4, **LAUNCH,
            )  # fmt: skip
    return out


def scatter_slots_fwd(sequence: Tensor, slots: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    return _spliced(sequence, slots, input_ids, slot_ids)


def scatter_slots_bwd(
    grad: Tensor, input_ids: Tensor, slot_ids: Tensor, need_sequence: bool, need_slots: bool
) -> tuple[Tensor, Tensor]:
    d_sequence = _spliced(grad, None, input_ids, slot_ids) if need_sequence else grad.new_empty((0,))
    d_slots = grad.new_empty((0,), dtype=torch.float32)
    if need_slots:
        d_slots = _sums(grad, input_ids, slot_ids, torch.float32, False)
    return d_sequence, d_slots
