"""How the memory kernels are launched: block sizes, warps, options, and the order of the fields."""

from __future__ import annotations

from typing import Any

import triton

from .._common import ALL_REGISTERS

STATE = ("memory", "usage", "links", "precedence", "read_weights", "write_weights")
INTERFACE = (
    "read_keys", "read_strengths", "read_modes", "write_keys", "write_strengths", "write_vectors", "erase_vectors",
    "free_gates", "allocation_gates", "write_gates",
)  # fmt: skip

EXACT: dict[str, Any] = {**ALL_REGISTERS, "enable_fp_fusion": False}
"""For what decides an order of slots: a fused multiply-add rounds otherwise than the two operations, and so breaks
other ties."""


def tiles(slots: int, width: int, heads: int = 1) -> dict[str, int]:
    """Block sizes for N slots and W columns; smaller ones where several write heads keep a block each."""
    nb, bw = triton.next_power_of_2(slots), min(triton.next_power_of_2(width), 64)
    return {"NB": nb, "BN": max(1, min(nb, (4096 if heads == 1 else 1024) // bw)), "BW": bw}


def link_tiles(slots: int, heads: int) -> tuple[int, int]:
    """(BI, BJ): a block of links, times the read heads, stays in registers."""
    nb, rb = triton.next_power_of_2(slots), triton.next_power_of_2(heads)
    bj = min(nb, 64)
    fits = 8192 if slots % 16 == 0 else 4096  # without wide loads every element needs registers for its address
    return max(1, min(nb, 32, fits // (bj * rb))), bj


def warps(slots: int, width: int = 1) -> int:
    return 8 if slots > 128 or slots * width >= 4096 else 4
