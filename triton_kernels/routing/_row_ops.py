"""temperature_softmax, routing_entropy and load_balance_loss on rows of K values."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import cast, on_device
from ._configs import launch_options, power
from ._forward import as_bytes
from ._shared import (
    GROUP,
    clamp,
    entropy_slope,
    finish_loss,
    finish_sums,
    group_count,
    group_tickets,
    load_terms,
    row_entropy,
    row_softmax,
)


@triton.jit
def _softmax(
    logits, temperature, probs, grad, d_logits, d_temperature, terms, groups, ticket,
    B, K, temperature_value, limit, BOUNDED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Forward where ``probs`` is given, otherwise backward."""
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)[None, :]
    lanes = (rows < B)[:, None] & (k < K)
    at = rows[:, None] * K + k
    z = tl.load(logits + at, mask=lanes, other=0.0).to(tl.float32)
    clamped = clamp(z, limit)
    t = temperature_value
    if temperature is not None:
        t = tl.load(temperature).to(tl.float32)
    p, top = row_softmax(clamped, k, K, t)
    if probs is not None:
        tl.store(probs + at, cast(p, probs.dtype.element_ty), mask=lanes)
    else:
        g = tl.load(grad + at, mask=lanes, other=0.0).to(tl.float32)
        dz = p * (g - tl.sum(p * g, 1)[:, None]) / t
        if terms is not None:
            share = -tl.sum(tl.where(lanes, dz * (clamped - top[:, None]), 0.0), 1) / t
            tl.store(terms + block, tl.sum(share, 0))
            finish_sums(terms, groups, ticket, block, tl.num_programs(0), 0, None, d_temperature, GROUP, 1)
        if BOUNDED:
            dz = tl.where(tl.abs(z) <= limit, dz, 0.0)
        tl.store(d_logits + at, cast(dz, d_logits.dtype.element_ty), mask=lanes)


@triton.jit
def _entropy(probs, entropy, grad, d_probs, B, K, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Forward where ``entropy`` is given, otherwise backward."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)[None, :]
    lanes = (rows < B)[:, None] & (k < K)
    at = rows[:, None] * K + k
    p = tl.load(probs + at, mask=lanes, other=0.0).to(tl.float32)
    if entropy is not None:
        tl.store(entropy + rows, row_entropy(p), mask=rows < B)
    else:
        g = tl.load(grad + rows, mask=rows < B, other=0.0)
        tl.store(d_probs + at, cast(entropy_slope(p) * g[:, None], d_probs.dtype.element_ty), mask=lanes)


@triton.jit
def _balance(
    probs, row_mask, loss, loss_weights, terms, groups, ticket, B, K,
    GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)[None, :]
    counted = rows < B
    if row_mask is not None:
        counted = counted & (tl.load(row_mask + rows, mask=rows < B, other=0) != 0)
    lanes = (rows < B)[:, None] & (k < K)
    p = tl.load(probs + rows[:, None] * K + k, mask=lanes, other=0.0).to(tl.float32)
    # Past the last expert below every probability.
    load_terms(tl.where(k < K, p, -1.0), counted, k, terms, block, K, BLOCK_K)
    finish_loss(terms, groups, ticket, block, tl.num_programs(0), K, loss, loss_weights, GROUP, BLOCK_K)


@triton.jit
def _balance_backward(grad, row_mask, loss_weights, d_probs, B, K, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)[None, :]
    lanes = (rows < B)[:, None] & (k < K)
    g = tl.load(loss_weights + k, mask=k < K, other=0.0) * tl.load(grad)
    g = tl.zeros((BLOCK_B, BLOCK_K), tl.float32) + g
    if row_mask is not None:
        counted = tl.load(row_mask + rows, mask=rows < B, other=0) != 0
        g = tl.where(counted[:, None], g, 0.0)
    tl.store(d_probs + rows[:, None] * K + k, cast(g, d_probs.dtype.element_ty), mask=lanes)


class _Rows:
    """A tensor as rows of K values, in tiles that fill four warps."""

    def __init__(self, x: Tensor) -> None:
        self.dense = x.contiguous()
        self.size = x.shape[-1]
        self.rows = x.numel() // self.size if self.size else 0
        self.block_k = power(self.size)
        self.block_b = max(1, min(power(self.rows), 2048 // self.block_k))
        self.blocks = triton.cdiv(self.rows, self.block_b)
        num_warps = 4 if self.block_k <= 4096 else 8
        self.options = {"BLOCK_B": self.block_b, "BLOCK_K": self.block_k, **launch_options(num_warps)}


def temperature_softmax_fwd(
    logits: Tensor, temperature: Tensor | None, temperature_value: float, clamp: float
) -> Tensor:
    r = _Rows(logits)
    probs = torch.empty_like(r.dense)
    if r.rows:
        with on_device(logits):
            _softmax[(r.blocks,)](
                r.dense, temperature, probs, None, None, None, None, None, None,
                r.rows, r.size, float(temperature_value), float(clamp), BOUNDED=False, GROUP=GROUP, **r.options,
            )  # fmt: skip
    return probs


def temperature_softmax_bwd(
    grad: Tensor,
    logits: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    clamp: float,
    need_temperature: bool,
) -> tuple[Tensor, Tensor]:
    r = _Rows(logits)
    d_logits = torch.empty_like(r.dense)
    d_temperature = torch.empty(() if need_temperature else (0,), dtype=torch.float32, device=logits.device)
    if r.rows == 0:
        return d_logits, d_temperature.zero_()

    def terms(count: int) -> Tensor | None:
        return torch.empty(count, dtype=torch.float32, device=logits.device) if need_temperature else None

    with on_device(logits):
        _softmax[(r.blocks,)](
            r.dense, temperature, None, grad.contiguous(), d_logits, d_temperature if need_temperature else None,
            terms(r.blocks), terms(group_count(r.blocks)),
            group_tickets(logits, r.blocks) if need_temperature else None,
            r.rows, r.size, float(temperature_value), float(clamp),
            BOUNDED=math.isfinite(clamp), GROUP=GROUP, **r.options,
        )  # fmt: skip
    return d_logits, d_temperature


def routing_entropy_fwd(probs: Tensor) -> Tensor:
    r = _Rows(probs)
    entropy = torch.empty(probs.shape[:-1], dtype=torch.float32, device=probs.device)
    if r.rows:
        with on_device(probs):
            _entropy[(r.blocks,)](r.dense, entropy, None, None, r.rows, r.size, **r.options)
    return entropy


def routing_entropy_bwd(grad: Tensor, probs: Tensor) -> Tensor:
    r = _Rows(probs)
    d_probs = torch.empty_like(r.dense)
    if r.rows:
        with on_device(probs):
            _entropy[(r.blocks,)](r.dense, None, grad.contiguous(), d_probs, r.rows, r.size, **r.options)
    return d_probs


def load_balance_loss_fwd(probs: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    r = _Rows(probs)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=probs.device)

    loss, loss_weights = new(), new(r.size)
    if r.rows == 0:
        return loss.zero_(), loss_weights.zero_()
    with on_device(probs):
        _balance[(r.blocks,)](
            r.dense, as_bytes(row_mask), loss, loss_weights,
            new(r.blocks, 2 * r.size + 1), new(group_count(r.blocks), 2 * r.size + 1),
            group_tickets(probs, r.blocks), r.rows, r.size, GROUP=GROUP, **r.options,
        )  # fmt: skip
    return loss, loss_weights


def load_balance_loss_bwd(grad: Tensor, probs: Tensor, row_mask: Tensor | None, loss_weights: Tensor) -> Tensor:
    r = _Rows(probs)
    d_probs = torch.empty_like(r.dense)
    if r.rows:
        with on_device(probs):
            _balance_backward[(r.blocks,)](
                grad, as_bytes(row_mask), loss_weights, d_probs, r.rows, r.size, **r.options
            )  # fmt: skip
    return d_probs
