"""What works on rows of N slots alone: sharpening, allocation, usage."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import ALL_REGISTERS, on_device
from .._device import (
    TINY,
    USAGE_EPS,
    allocation_slopes,
    kept_by_others,
    logs_before,
    retention,
    retention_of_others,
    sharpened,
    written,
)
from .._launch import EXACT, warps


@triton.jit
def _sharpen_fwd(weights, gamma, out, N, NB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    w = tl.load(weights + row * N + n, mask=ok, other=0.0)
    tl.store(out + row * N + n, sharpened(w, tl.load(gamma + row), ok), mask=ok)


@triton.jit
def _sharpen_bwd(grad, weights, gamma, out, d_weights, d_gamma, N, NB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    at = row * N + n
    w, after = tl.load(weights + at, mask=ok, other=0.0), tl.load(out + at, mask=ok, other=0.0)
    slope = tl.load(grad + at, mask=ok, other=0.0)
    positive = ok & (w >= TINY)
    safe = tl.where(positive, w, 1.0)
    d_logit = tl.where(positive, after * (slope - tl.sum(after * slope, axis=0)), 0.0)
    tl.store(d_gamma + row, tl.sum(d_logit * tl.log(safe), axis=0))
    tl.store(d_weights + at, d_logit * tl.load(gamma + row) / safe, mask=ok)


def sharpen_fwd(weights: Tensor, gamma: Tensor) -> Tensor:
    """Launcher of ``memkern::sharpen_fwd``, rows (M, N) with an exponent each."""
    weights, gamma = weights.contiguous(), gamma.contiguous()
    out, slots = torch.empty_like(weights), weights.shape[-1]
    with on_device(weights):
        _sharpen_fwd[(gamma.numel(),)](
            weights, gamma, out, slots, NB=triton.next_power_of_2(slots), **row_options(slots)
        )
    return out


def sharpen_bwd(grad: Tensor, weights: Tensor, gamma: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::sharpen_bwd``."""
    grad, weights, gamma, sharp = grad.contiguous(), weights.contiguous(), gamma.contiguous(), sharp.contiguous()
    d_weights, d_gamma, slots = torch.empty_like(weights), torch.empty_like(gamma), weights.shape[-1]
    with on_device(weights):
        _sharpen_bwd[(gamma.numel(),)](
            grad,
            weights,
            gamma,
            sharp,
            d_weights,
            d_gamma,
            slots,
            NB=triton.next_power_of_2(slots),
            **row_options(slots),
        )
    return d_weights, d_gamma


def row_options(slots: int) -> dict[str, Any]:
    return {"num_warps": warps(slots), **ALL_REGISTERS}


@triton.jit
def _allocation_fwd(usage, scratch, out, N, NB: tl.constexpr, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    used = tl.load(usage + b * N + n, mask=ok, other=0.0)
    entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
    tl.store(scratch + b * N + n, entered, mask=ok)
    tl.debug_barrier()
    free = (1.0 - used) * (1.0 - USAGE_EPS) * tl.exp(logs_before(scratch + b * N, entered, n, N, NB, BJ))
    tl.store(out + b * N + n, free, mask=ok)


@triton.jit
def _allocation_bwd(grad, usage, scratch, mass, d_usage, N, NB: tl.constexpr, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    used = tl.load(usage + b * N + n, mask=ok, other=0.0)
    slope = tl.load(grad + b * N + n, mask=ok, other=0.0)
    entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
    tl.store(scratch + b * N + n, entered, mask=ok)
    tl.debug_barrier()
    reach = tl.exp(logs_before(scratch + b * N, entered, n, N, NB, BJ))
    tl.store(mass + b * N + n, (1.0 - used) * (1.0 - USAGE_EPS) * reach * slope, mask=ok)
    tl.debug_barrier()
    _, behind = allocation_slopes(scratch + b * N, mass + b * N, entered, n, N, NB, BJ)
    tl.store(d_usage + b * N + n, (behind / entered - reach * slope) * (1.0 - USAGE_EPS), mask=ok)


def _pairs(slots: int) -> dict[str, Any]:
    nb = triton.next_power_of_2(slots)
    return {"NB": nb, "BJ": max(1, min(32, 4096 // nb)), "num_warps": warps(slots), **EXACT}


def allocation_weights_fwd(usage: Tensor) -> Tensor:
    """Launcher of ``memkern::allocation_weights_fwd``."""
    usage = usage.contiguous()
    out, scratch = torch.empty_like(usage), torch.empty_like(usage)
    with on_device(usage):
        _allocation_fwd[(usage.shape[0],)](usage, scratch, out, usage.shape[1], **_pairs(usage.shape[1]))
    return out


def allocation_weights_bwd(grad: Tensor, usage: Tensor) -> Tensor:
    """Launcher of ``memkern::allocation_weights_bwd``."""
    grad, usage = grad.contiguous(), usage.contiguous()
    d_usage, scratch, mass = torch.empty_like(usage), torch.empty_like(usage), torch.empty_like(usage)
    with on_device(usage):
        _allocation_bwd[(usage.shape[0],)](
            grad, usage, scratch, mass, d_usage, usage.shape[1], **_pairs(usage.shape[1])
        )
    return d_usage


@triton.jit
def _usage_fwd(
    usage, write_weights, read_weights, free_gates, out, N, H: tl.constexpr, R: tl.constexpr, NB: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    u = tl.load(usage + b * N + n, mask=ok, other=0.0)
    used = u + written(write_weights, b, n, ok, N, H) * (1.0 - u)
    used = used * retention(read_weights, free_gates, b, n, ok, N, R)
    tl.store(out + b * N + n, tl.where(used > 1.0, 1.0, tl.where(used < 0.0, 0.0, used)), mask=ok)


@triton.jit
def _usage_bwd(
    grad, usage, write_weights, read_weights, free_gates, d_usage, d_write_weights, d_read_weights, d_free, N,
    H: tl.constexpr, R: tl.constexpr, DETACH: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    u = tl.load(usage + b * N + n, mask=ok, other=0.0)
    wrote = written(write_weights, b, n, ok, N, H)
    psi = retention(read_weights, free_gates, b, n, ok, N, R)
    total = u + wrote * (1.0 - u)
    raw = total * psi
    slope = tl.where((raw < 0.0) | (raw > 1.0), 0.0, tl.load(grad + b * N + n, mask=ok, other=0.0))
    tl.store(d_usage + b * N + n, slope * psi * (1.0 - wrote), mask=ok)
    for h in range(H):
        d_w = tl.zeros((NB,), tl.float32)
        if not DETACH:
            d_w = slope * psi * (1.0 - u) * kept_by_others(write_weights, b, h, n, ok, N, H)
        tl.store(d_write_weights + (b * H + h) * N + n, d_w, mask=ok)
    for r in range(R):
        d_psi = slope * total * retention_of_others(read_weights, free_gates, b, r, n, ok, N, R)
        at = (b * R + r) * N + n
        tl.store(d_free + b * R + r, -tl.sum(d_psi * tl.load(read_weights + at, mask=ok, other=0.0), axis=0))
        tl.store(d_read_weights + at, -d_psi * tl.load(free_gates + b * R + r), mask=ok)


def update_usage_fwd(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> Tensor:
    """Launcher of ``memkern::update_usage_fwd``."""
    given = [x.contiguous() for x in (usage, write_weights, read_weights, free_gates)]
    out, (batch, slots) = torch.empty_like(given[0]), usage.shape
    with on_device(usage):
        _usage_fwd[(batch,)](
            *given, out, slots, H=write_weights.shape[1], R=read_weights.shape[1], NB=triton.next_power_of_2(slots),
            **row_options(slots),
        )  # fmt: skip
    return out


def update_usage_bwd(
    grad: Tensor, usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor, detach_write: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::update_usage_bwd``."""
    given = [x.contiguous() for x in (usage, write_weights, read_weights, free_gates)]
    made, (batch, slots) = [torch.empty_like(x) for x in given], usage.shape
    with on_device(usage):
        _usage_bwd[(batch,)](
            grad.contiguous(), *given, *made, slots, H=write_weights.shape[1], R=read_weights.shape[1],
            DETACH=detach_write, NB=triton.next_power_of_2(slots), **row_options(slots),
        )  # fmt: skip
    return made[0], made[1], made[2], made[3]
