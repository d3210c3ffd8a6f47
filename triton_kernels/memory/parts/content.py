"""Content weights: a softmax over the cosines of keys and slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import ALL_REGISTERS, on_device
from .._device import NORM_EPS, key_factors, softmax, unit_bwd, unit_factors
from .._launch import tiles, warps
from ..forward import lookup


@triton.jit
def _content_fwd(
    memory, keys, strengths, slot_mask, weights, N, W,
    H: tl.constexpr, HB: tl.constexpr, HAS_MASK: tl.constexpr,
    NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    factors = key_factors(keys, strengths, b, W, H, HB, BW)
    lookup(memory, keys, factors, weights, memory, memory, b, N, W, H, HB, 1, False, BN, BW)
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    taking_part = ok
    if HAS_MASK:
        taking_part = ok & (tl.load(slot_mask + b * N + n, mask=ok, other=0) != 0)
    for h in range(H):
        at = (b * H + h) * N + n
        found = softmax(tl.load(weights + at, mask=ok, other=0.0), taking_part)
        tl.debug_barrier()
        tl.store(weights + at, found, mask=ok)


@triton.jit
def _content_bwd(
    grad, memory, keys, strengths, slot_mask, weights, d_memory, d_keys, d_strengths, cosine, inverse, projection, N, W,
    H: tl.constexpr, HB: tl.constexpr, HAS_MASK: tl.constexpr,
    NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HB)
    units = unit_factors(keys, b, W, H, HB, BW)
    for first in range(0, N, BN):
        rows = first + tl.arange(0, BN)
        row_ok = rows < N
        if HAS_MASK:
            row_ok = row_ok & (tl.load(slot_mask + b * N + rows, mask=rows < N, other=0) != 0)
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, HB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            m = tl.load(
                memory + (b * N + rows)[:, None] * W + w[None, :], mask=row_ok[:, None] & (w < W)[None, :], other=0.0
            )
            squares += tl.sum(m * m, axis=1)
            for h in tl.static_range(H):
                k = tl.load(keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                dots += tl.where((heads == h)[None, :], tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(squares + NORM_EPS)
        lane = (b * H + heads)[None, :] * N + rows[:, None]
        tl.store(inverse + b * N + rows, scale, mask=rows < N)
        tl.store(cosine + lane, dots * units[None, :] * scale[:, None], mask=(rows < N)[:, None] & (heads < H)[None, :])
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    along = tl.zeros((NB,), tl.float32)
    for head in range(H):
        at = (b * H + head) * N + n
        found = tl.load(weights + at, mask=ok, other=0.0)
        slope = tl.load(grad + at, mask=ok, other=0.0)
        d_score = found * (slope - tl.sum(found * slope, axis=0))
        cos = tl.load(cosine + at, mask=ok, other=0.0)
        tl.store(d_strengths + b * H + head, tl.sum(d_score * (cos - tl.sum(found * cos, axis=0)), axis=0))
        d_cos = d_score * tl.load(strengths + b * H + head)
        along += d_cos * cos
        tl.debug_barrier()
        tl.store(cosine + at, d_cos, mask=ok)
    tl.store(projection + b * N + n, along, mask=ok)
    tl.debug_barrier()
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        d_k = tl.zeros((HB, BW), tl.float32)
        for first in range(0, N, BN):
            rows = first + tl.arange(0, BN)
            inside = (rows < N)[:, None] & (w < W)[None, :]
            part = inside
            if HAS_MASK:
                part = inside & (tl.load(slot_mask + b * N + rows, mask=rows < N, other=0) != 0)[:, None]
            cell = (b * N + rows)[:, None] * W + w[None, :]
            scale = tl.load(inverse + b * N + rows, mask=rows < N, other=0.0)
            unit = tl.load(memory + cell, mask=part, other=0.0) * scale[:, None]
            d_unit = -unit * tl.load(projection + b * N + rows, mask=rows < N, other=0.0)[:, None]
            for h in tl.static_range(H):
                d_c = tl.load(cosine + (b * H + h) * N + rows, mask=rows < N, other=0.0)
                k = tl.load(keys + (b * H + h) * W + w, mask=w < W, other=0.0)
                k = k * tl.sum(tl.where(heads == h, units, 0.0), axis=0)
                d_unit += d_c[:, None] * k[None, :]
                d_k += tl.where((heads == h)[:, None], tl.sum(d_c[:, None] * unit, axis=0)[None, :], 0.0)
            tl.store(d_memory + cell, tl.where(part, d_unit * scale[:, None], 0.0), mask=inside)
        tl.store(d_keys + (b * H + heads)[:, None] * W + w[None, :], d_k, mask=(heads < H)[:, None] & (w < W)[None, :])
    tl.debug_barrier()
    unit_bwd(keys, d_keys, b, W, H, HB, BW)


def content_weights_fwd(memory: Tensor, keys: Tensor, strengths: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Launcher of ``memkern::content_weights_fwd``."""
    memory, keys, strengths = memory.contiguous(), keys.contiguous(), strengths.contiguous()
    (batch, slots, width), heads = memory.shape, keys.shape[1]
    weights = torch.empty((batch, heads, slots), dtype=torch.float32, device=memory.device)
    mask = memory if slot_mask is None else slot_mask.contiguous()
    with on_device(memory):
        _content_fwd[(batch,)](
            memory, keys, strengths, mask, weights, slots, width, H=heads, HB=triton.next_power_of_2(heads),
            HAS_MASK=slot_mask is not None, **tiles(slots, width), num_warps=warps(slots), **ALL_REGISTERS,
        )  # fmt: skip
    return weights


def content_weights_bwd(
    grad: Tensor, memory: Tensor, keys: Tensor, strengths: Tensor, slot_mask: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::content_weights_bwd``."""
    grad, weights = grad.contiguous(), weights.contiguous()
    memory, keys, strengths = memory.contiguous(), keys.contiguous(), strengths.contiguous()
    (batch, slots, width), heads = memory.shape, keys.shape[1]
    d_memory, d_keys, d_strengths = torch.empty_like(memory), torch.empty_like(keys), torch.empty_like(strengths)
    cosine, rows = torch.empty_like(weights), torch.empty((2, batch, slots), dtype=torch.float32, device=memory.device)
    mask = memory if slot_mask is None else slot_mask.contiguous()
    with on_device(memory):
        _content_bwd[(batch,)](
            grad, memory, keys, strengths, mask, weights, d_memory, d_keys, d_strengths, cosine, rows[0], rows[1],
            slots, width, H=heads, HB=triton.next_power_of_2(heads), HAS_MASK=slot_mask is not None,
            **tiles(slots, width), num_warps=warps(slots), **ALL_REGISTERS,
        )  # fmt: skip
    return d_memory, d_keys, d_strengths
