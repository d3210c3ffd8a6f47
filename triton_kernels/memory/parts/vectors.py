"""Reading from the memory and writing to it, with given weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import ALL_REGISTERS, on_device
from .. import forward
from .._device import others
from .._launch import tiles


@triton.jit
def _read_fwd(memory, weights, reads, N, W, R: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    total = tl.zeros((RB, BW), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        m = tl.load(memory + (b * N + n)[:, None] * W + w[None, :], mask=ok[:, None] & (w < W)[None, :], other=0.0)
        for i in tl.static_range(R):
            part = tl.load(weights + (b * R + i) * N + n, mask=ok, other=0.0)
            total += tl.where((r == i)[:, None], tl.sum(part[:, None] * m, axis=0)[None, :], 0.0)
    tl.store(reads + (b * R + r)[:, None] * W + w[None, :], total, mask=(r < R)[:, None] & (w < W)[None, :])


@triton.jit
def _read_part_bwd(
    grad, memory, weights, d_memory, d_weights, N, W,
    R: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < N
    slopes = tl.zeros((BN, RB), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m = tl.load(memory + cell, mask=inside, other=0.0)
        d_m = tl.zeros((BN, BW), tl.float32)
        for i in tl.static_range(R):
            g = tl.load(grad + (b * R + i) * W + w, mask=w < W, other=0.0)
            part = tl.load(weights + (b * R + i) * N + n, mask=ok, other=0.0)
            slopes += tl.where((r == i)[None, :], tl.sum(m * g[None, :], axis=1)[:, None], 0.0)
            d_m += part[:, None] * g[None, :]
        tl.store(d_memory + cell, d_m, mask=inside)
    tl.store(d_weights + (b * R + r)[None, :] * N + n[:, None], slopes, mask=ok[:, None] & (r < R)[None, :])


def read_memory_fwd(memory: Tensor, weights: Tensor) -> Tensor:
    """Launcher of ``memkern::read_memory_fwd``."""
    memory, weights = memory.contiguous(), weights.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    reads = torch.empty((batch, heads, width), dtype=torch.float32, device=memory.device)
    tile = tiles(slots, width)
    with on_device(memory):
        _read_fwd[(batch, triton.cdiv(width, tile["BW"]))](
            memory, weights, reads, slots, width, R=heads, RB=triton.next_power_of_2(heads), BN=tile["BN"],
            BW=tile["BW"], num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
    return reads


def read_memory_bwd(grad: Tensor, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::read_memory_bwd``."""
    grad, memory, weights = grad.contiguous(), memory.contiguous(), weights.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    d_memory, d_weights, tile = torch.empty_like(memory), torch.empty_like(weights), tiles(slots, width)
    with on_device(memory):
        _read_part_bwd[(batch, triton.cdiv(slots, tile["BN"]))](
            grad, memory, weights, d_memory, d_weights, slots, width, R=heads, RB=triton.next_power_of_2(heads),
            BN=tile["BN"], BW=tile["BW"], num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
    return d_memory, d_weights


@triton.jit
def _write_weights_bwd(
    grad, memory, weights, erase, add, d_memory, d_weights, N, W,
    H: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < N
    slopes = tl.zeros((BN, HB), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m, g = tl.load(memory + cell, mask=inside, other=0.0), tl.load(grad + cell, mask=inside, other=0.0)
        for h in tl.static_range(H):
            e = tl.load(erase + (b * H + h) * W + w, mask=w < W, other=0.0)
            v = tl.load(add + (b * H + h) * W + w, mask=w < W, other=0.0)
            rest = others(weights, erase, b, h, n, ok, w, N, W, H, BN, BW)
            slope = tl.sum(g * (v[None, :] - m * rest * e[None, :]), axis=1)
            slopes += tl.where((heads == h)[None, :], slope[:, None], 0.0)
        tl.store(d_memory + cell, g * others(weights, erase, b, H, n, ok, w, N, W, H, BN, BW), mask=inside)
    tl.store(d_weights + (b * H + heads)[None, :] * N + n[:, None], slopes, mask=ok[:, None] & (heads < H)[None, :])


@triton.jit
def _write_vectors_bwd(
    grad, memory, weights, erase, d_erase, d_add, N, W,
    H: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    d_e = tl.zeros((HB, BW), tl.float32)
    d_v = tl.zeros((HB, BW), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        inside = ok[:, None] & (w < W)[None, :]
        cell = (b * N + n)[:, None] * W + w[None, :]
        m, g = tl.load(memory + cell, mask=inside, other=0.0), tl.load(grad + cell, mask=inside, other=0.0)
        for h in tl.static_range(H):
            here = (heads == h)[:, None]
            weight = tl.load(weights + (b * H + h) * N + n, mask=ok, other=0.0)
            rest = others(weights, erase, b, h, n, ok, w, N, W, H, BN, BW)
            d_e -= tl.where(here, tl.sum(g * m * rest * weight[:, None], axis=0)[None, :], 0.0)
            d_v += tl.where(here, tl.sum(g * weight[:, None], axis=0)[None, :], 0.0)
    to, to_ok = (b * H + heads)[:, None] * W + w[None, :], (heads < H)[:, None] & (w < W)[None, :]
    tl.store(d_erase + to, d_e, mask=to_ok)
    tl.store(d_add + to, d_v, mask=to_ok)


def write_memory_fwd(memory: Tensor, weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor) -> Tensor:
    """Launcher of ``memkern::write_memory_fwd``."""
    memory, weights = memory.contiguous(), weights.contiguous()
    said = {"erase_vectors": erase_vectors.contiguous(), "write_vectors": write_vectors.contiguous()}
    new = torch.empty_like(memory)
    with on_device(memory):
        forward.write_memory(memory, weights, weights, said | {"free_gates": memory}, None, False, new)
    return new


def write_memory_bwd(
    grad: Tensor, memory: Tensor, weights: Tensor, erase_vectors: Tensor, write_vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::write_memory_bwd``: gradients along the slots, and along the columns."""
    grad, memory, weights = grad.contiguous(), memory.contiguous(), weights.contiguous()
    erase, add = erase_vectors.contiguous(), write_vectors.contiguous()
    (batch, slots, width), heads = memory.shape, weights.shape[1]
    d_memory, d_weights = torch.empty_like(memory), torch.empty_like(weights)
    d_erase, d_add = torch.empty_like(erase), torch.empty_like(add)
    tile = tiles(slots, width, heads)
    block = {"H": heads, "HB": triton.next_power_of_2(heads), "BN": tile["BN"], "BW": tile["BW"], "num_warps": 4}
    with on_device(memory):
        _write_weights_bwd[(batch, triton.cdiv(slots, tile["BN"]))](
            grad, memory, weights, erase, add, d_memory, d_weights, slots, width, **block, **ALL_REGISTERS
        )
        _write_vectors_bwd[(batch, triton.cdiv(width, tile["BW"]))](
            grad, memory, weights, erase, d_erase, d_add, slots, width, **block, **ALL_REGISTERS
        )
    return d_memory, d_weights, d_erase, d_add
