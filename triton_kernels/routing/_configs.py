"""Block sizes of the routing kernels, by shape alone: data, not search, so that no call pays for tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from .._common import LAUNCH, capability, sm_count

POOL_TILE = 4096
"""Elements of a (slots, columns) tile: 32 a thread, four 16-byte loads in flight."""
PROJECT_TILE = 4096
"""Elements of an (experts, columns) tile of the weight that waits in registers."""
WHOLE_SLOT = 8192
"""Widest slot that attention keeps in registers and so reads once."""


def power(n: int) -> int:
    return int(triton.next_power_of_2(max(1, n)))


def launch_options(num_warps: int) -> dict[str, Any]:
    """Of the kernels over rows: left to itself ptxas gives some a few registers too few, and 8 or 16 bytes of stack."""
    return {"num_warps": num_warps, "maxnreg": 255 if num_warps <= 8 else 128, **LAUNCH}


@dataclass(frozen=True)
class RowConfig:
    """Of a kernel over (row blocks, splits of D). ``dot``: many rows a program, projected by matrix products."""

    dot: bool
    block_b: int
    block_s: int
    block_d: int
    block_k: int
    blocks: int
    splits: int
    split_width: int
    whole: bool
    block_a: int
    block_w: int
    num_warps: int


def row_config(hiddens: Tensor, experts: int, pooling: int, *, low: bool = False, backward: bool = False) -> RowConfig:
    """For a (B, S, D) input. Few rows are split along D until they fill the multiprocessors."""
    rows, slots, width = hiddens.shape
    block_k, attention = power(experts), pooling == 2
    # A weight read for every row costs more than the row itself once it has few slots or there are many experts.
    dot = not attention and (experts > 16 or (slots <= 4 and rows >= 128))
    block_w = power(width) if width <= WHOLE_SLOT else 2048
    block_a = max(1, min(power(slots), POOL_TILE // block_w))
    if dot:
        block_k = max(16, block_k)
        # Each program reads the whole weight: the more rows share it the better, while there are enough programs and
        # the routed values of a thread leave registers for the product. The limits are those without spills.
        wide = low and capability(hiddens.device) >= 90
        most = 16 if backward else min(64, (8192 if wide else 4096) // block_k)
        block_b = min(most, max(16, power(rows // sm_count(hiddens.device)) // 2))
        block_d, block_s = 64 if low else 32 if backward else 16, 1
        warps = min(8, max(4, block_b * block_k // (256 if backward else 512)))
        if backward and block_k == 256:
            warps = 4
    else:
        block_b = 1
        block_d = max(16, min(power(width), 256, PROJECT_TILE // block_k))
        if rows * triton.cdiv(max(width, 1), block_d) < sm_count(hiddens.device):
            block_d = max(16, min(block_d, 128))
        block_s = max(1, min(power(slots), POOL_TILE // block_d))
        warps = 8 if attention and block_w > 2048 else 4
    blocks = triton.cdiv(rows, block_b)
    chunks = triton.cdiv(max(width, 1), block_d)
    splits = 1 if attention else max(1, min(chunks, 2 * sm_count(hiddens.device) // max(1, blocks)))
    split_width = triton.cdiv(chunks, splits) * block_d
    splits = triton.cdiv(max(width, 1), split_width)
    return RowConfig(
        dot, block_b, block_s, block_d, block_k, blocks, splits, split_width,
        width <= WHOLE_SLOT, block_a, block_w, warps,
    )  # fmt: skip


@dataclass(frozen=True)
class WeightConfig:
    """Of the weight's gradient: tiles of (experts, columns), the rows split until the tiles fill the machine."""

    block_k: int
    block_d: int
    block_r: int
    splits: int
    split_rows: int
    num_warps: int

    def tiles(self, experts: int, width: int) -> tuple[int, int]:
        return triton.cdiv(width, self.block_d), triton.cdiv(experts, self.block_k)


def weight_config(hiddens: Tensor, experts: int, pooling: int) -> WeightConfig:
    rows, _, width = hiddens.shape
    block_k = min(32, max(16, power(experts)))
    # Attention sums the query's parts beside the product: half the rows at a time leave registers for it.
    block_d, block_r = 64, 16 if pooling == 2 else 32
    tiles = max(1, triton.cdiv(width, block_d) * triton.cdiv(experts, block_k))
    splits = max(1, min(triton.cdiv(rows, 4 * block_r), 2 * sm_count(hiddens.device) // tiles))
    split_rows = triton.cdiv(triton.cdiv(rows, splits), block_r) * block_r
    return WeightConfig(block_k, block_d, block_r, triton.cdiv(rows, split_rows), split_rows, 4)
