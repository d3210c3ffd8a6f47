"""The one buffer in which forward leaves what backward reads; memkern/ops/routing/_schemas.py has the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def _counts(rows: int, slots: int, width: int, experts: int, pooling: int) -> tuple[int, ...]:
    pool = rows * width if slots != 1 else 0
    return rows * experts, pool, rows * slots if pooling == 2 else 0, experts, (rows + 3) // 4


def _padded(count: int) -> int:
    return (count + 15) // 16 * 16


def saved_size(rows: int, slots: int, width: int, experts: int, pooling: int) -> int:
    return sum(map(_padded, _counts(rows, slots, width, experts, pooling)))


def split_saved(
    saved: Tensor, rows: int, slots: int, width: int, experts: int, pooling: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Flat views: raw, pool (int32 for the maximum) or None, slot_weights or None, loss_weights, zero_rows (uint8)."""
    parts = []
    first = 0
    for count in _counts(rows, slots, width, experts, pooling):
        parts.append(saved[first : first + count])
        first += _padded(count)
    raw, pool, slot_weights, loss_weights, zero_rows = parts
    if pooling == 1:
        pool = pool.view(torch.int32)
    return (
        raw,
        pool if slots != 1 else None,
        slot_weights if pooling == 2 else None,
        loss_weights,
        zero_rows.view(torch.uint8),
    )
