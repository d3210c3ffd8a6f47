"""Fusion of gated sources in Triton: the gates of a row are made where they are used, in one launch each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import ALL_REGISTERS, LAUNCH, adjacent, cast, on_device


@triton.jit
def _gates(gate_logits, row, live, sgr, sgn, COLUMNS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, BLOCK_N) softmax over the present sources, at their columns; 0 for the others."""
    column = tl.arange(0, BLOCK_N)
    present = column < 0
    for i in tl.static_range(COUNT):
        present = present | (column == COLUMNS[i])
    at = row[:, None] * sgr + column[None, :] * sgn
    logit = tl.load(gate_logits + at, mask=live[:, None] & present[None, :], other=float("-inf")).to(tl.float32)
    best = tl.max(logit, axis=1)
    # A row out of range has no logit at all; a NaN has to stay one.
    gate = tl.where(present[None, :], tl.exp(logit - tl.where(live, best, 0.0)[:, None]), 0.0)
    mass = tl.sum(gate, axis=1)
    return gate / tl.where(live, mass, 1.0)[:, None]


@triton.jit
def _fuse_fwd(
    sources, strides, gate_logits, out, rows, width, sgr, sgn,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < rows
    inside = live[:, None] & (d < width)[None, :]
    gate = _gates(gate_logits, row, live, sgr, sgn, COLUMNS, COUNT, BLOCK_N)
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in tl.static_range(COUNT):
        one = tl.sum(tl.where((column == COLUMNS[i])[None, :], gate, 0.0), axis=1)
        x = tl.load(sources[i] + row[:, None] * strides[i] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += one[:, None] * x
    tl.store(out + row[:, None] * width + d[None, :], cast(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _fuse_bwd(
    grad, sources, strides, gate_logits, d_sources, d_gates, rows, width, columns, sr, sgr, sgn,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < rows
    gate = _gates(gate_logits, row, live, sgr, sgn, COLUMNS, COUNT, BLOCK_N)
    column = tl.arange(0, BLOCK_N)
    d_gate = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < width)[None, :]
        g = tl.load(grad + row[:, None] * sr + d[None, :], mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(COUNT):
            here = (column == COLUMNS[i])[None, :]
            one = tl.sum(tl.where(here, gate, 0.0), axis=1)
            x = tl.load(sources[i] + row[:, None] * strides[i] + d[None, :], mask=inside, other=0.0).to(tl.float32)
            d_gate += tl.where(here, tl.sum(g * x, axis=1)[:, None], 0.0)
            to = d_sources[i] + row[:, None] * width + d[None, :]
            tl.store(to, cast(one[:, None] * g, d_sources[i].dtype.element_ty), mask=inside)
    d_logit = gate * (d_gate - tl.sum(gate * d_gate, axis=1)[:, None])
    written = live[:, None] & (column < columns)[None, :]
    present = column < 0
    for i in tl.static_range(COUNT):
        present = present | (column == COLUMNS[i])
    d_logit = tl.where(present[None, :], d_logit, 0.0)
    tl.store(d_gates + row[:, None] * columns + column[None, :], cast(d_logit, d_gates.dtype.element_ty), mask=written)


def _as_rows(x: Tensor) -> Tensor:
    """(B, T, D) as (B T, D) with consecutive columns, a view where the strides allow it."""
    return adjacent(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1])))


def _tile(sources: int, width: int) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_D): all sources are loaded before the first is used, so many of them take smaller blocks."""
    elements = 2048 if sources <= 4 else 512
    block_d = min(elements, triton.next_power_of_2(width))
    return max(1, min(16, elements // block_d)), block_d


def fuse_sources_fwd(sources: Sequence[Tensor], gate_logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Launcher of ``memkern::fuse_sources_fwd``: one launch."""
    first = sources[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    width, given = first.shape[2], [_as_rows(x) for x in sources]
    gates = gate_logits.reshape(-1, gate_logits.shape[-1])
    block_t, block_d = _tile(len(given), min(width, 1024))
    rows = gates.shape[0]
    with on_device(first):
        _fuse_fwd[(triton.cdiv(rows, block_t), triton.cdiv(width, block_d))](
            tuple(given), tuple(x.stride(0) for x in given), gates, out, rows, width, *gates.stride(),
            COLUMNS=tuple(columns), COUNT=len(given), BLOCK_N=triton.next_power_of_2(gates.shape[1]),
            BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return out


def fuse_sources_bwd(
    grad: Tensor, sources: Sequence[Tensor], gate_logits: Tensor, columns: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Launcher of ``memkern::fuse_sources_bwd``: one launch."""
    device = grad.device
    d_sources = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in sources]
    d_gates = torch.empty(gate_logits.shape, dtype=gate_logits.dtype, device=device)
    if grad.numel() == 0:
        return d_sources, d_gates.zero_()
    width, given, g = grad.shape[2], [_as_rows(x) for x in sources], _as_rows(grad)
    gates = gate_logits.reshape(-1, gate_logits.shape[-1])
    block_t, block_d = _tile(len(given), width)
    rows, count = gates.shape
    with on_device(grad):
        _fuse_bwd[(triton.cdiv(rows, block_t),)](
            g, tuple(given), tuple(x.stride(0) for x in given), gates, tuple(d_sources), d_gates,
            rows, width, count, g.stride(0), *gates.stride(),
            COLUMNS=tuple(columns), COUNT=len(given), BLOCK_N=triton.next_power_of_2(count),
            BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
    return d_sources, d_gates
