"""Temperature-softmax routing with load-balance loss in pure PyTorch: what the compiled backends have to compute.

The load-balance loss is that of Fedus, Zoph and Shazeer, "Switch Transformers" (2021), equation 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memkern.reference._common import compute_dtype, full_precision

ENTROPY_EPS = 1e-10
ZERO_ROW = 1e-10


class Routing(NamedTuple):
    """What :func:`route_experts` returns."""

    probs: Tensor
    """(B, K), dtype of ``hiddens``; rows sum to 1."""
    logits: Tensor
    """(B, K) float32, clamped, before the temperature."""
    entropy: Tensor
    """(B,) float32, natural logarithm."""
    load_balance_loss: Tensor
    """() float32."""


class RoutingDetails(NamedTuple):
    """A :class:`Routing` before it is rounded, with what a loss over several processes needs."""

    routing: Routing
    probs: Tensor
    zero_rows: Tensor


def pool_slots(
    hiddens: Tensor, pooling: str = "mean", pool_query: Tensor | None = None, slot_mask: Tensor | None = None
) -> Tensor:
    """(B, S, D) -> (B, D) by mean, max or attention over the unmasked slots; a row without any pools to zero."""
    x = hiddens.to(compute_dtype(hiddens))
    slots, width = x.shape[1], x.shape[2]
    if slots == 0 and pooling != "attention":
        return x.sum(1)
    if slot_mask is not None:
        x = torch.where(slot_mask[..., None], x, 0.0)
    if pooling == "mean":
        if slot_mask is None:
            return x.mean(1)
        return x.sum(1) / slot_mask.sum(1).clamp(min=1)[:, None].to(x.dtype)
    if pooling == "max":
        candidates = x if slot_mask is None else torch.where(slot_mask[..., None], x, -math.inf)
        # argmax and not max: of equal values it documents the lowest index, and so where the gradient goes.
        pooled = candidates.gather(1, candidates.detach().argmax(1, keepdim=True)).squeeze(1)
        return pooled if slot_mask is None else torch.where(slot_mask.any(1)[:, None], pooled, 0.0)
    assert pool_query is not None
    scores = (x @ pool_query.to(x.dtype)) / math.sqrt(width)
    if slot_mask is not None:
        present = slot_mask.any(1, keepdim=True)
        scores = torch.where(slot_mask, scores, torch.where(present, -math.inf, 0.0))
    return (torch.softmax(scores, 1)[..., None] * x).sum(1)


def tempered_softmax(z: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(z / T) that stays finite for every T > 0: the maximum goes before the division."""
    shifted = z - z.detach().amax(-1, keepdim=True)
    return torch.softmax(shifted / (temperature.to(z.dtype) if isinstance(temperature, Tensor) else temperature), -1)


def clamp_logits(raw: Tensor, clamp: float | None, straight_through: bool = False) -> Tensor:
    """Clamp to [-clamp, clamp]; ``straight_through`` passes the gradient of a saturated value unchanged."""
    if clamp is None:
        return raw
    clamped = raw.clamp(-clamp, clamp)
    if not straight_through:
        return clamped
    # A zero whose gradient is one, added to the exact value; inf - inf must not reach it.
    return clamped.detach() + torch.nan_to_num(raw - raw.detach(), nan=0.0)


def route_experts_details(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    pooling: str = "mean",
    pool_query: Tensor | None = None,
    slot_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    clamp: float | None = 10.0,
    straight_through: bool = False,
) -> RoutingDetails:
    """:func:`route_experts`, with the unrounded probabilities and the rows that pooled to zero."""

    def route(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(rows)
        x = pool_slots(rows, pooling, pool_query, slot_mask)
        raw = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = clamp_logits(raw, clamp, straight_through)
        zero_rows = (x.detach().abs() < ZERO_ROW).all(1)
        uniform = torch.full_like(logits, 1.0 / weight.shape[0])
        routed = tempered_softmax(logits.masked_fill(zero_rows[:, None], 0.0), temperature)
        return logits, torch.where(zero_rows[:, None], uniform, routed), zero_rows

    with full_precision(hiddens):
        logits, probs, zero_rows = route(hiddens)
        counted = probs
        if row_mask is not None:
            # Routed once more without them: zero times the NaN that a masked row may hold is NaN in every gradient.
            counted = route(torch.where(row_mask[:, None, None], hiddens, 0.0))[1]
        loss = load_balance_loss(counted, row_mask=row_mask)
        return RoutingDetails(Routing(probs.to(hiddens.dtype), logits, routing_entropy(probs), loss), probs, zero_rows)


def route_experts(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    pooling: str = "mean",
    pool_query: Tensor | None = None,
    slot_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    clamp: float | None = 10.0,
    straight_through: bool = False,
) -> Routing:
    """Pool, project, clamp, softmax, entropy and loss; arguments as :func:`memkern.ops.routing.route_experts`."""
    return route_experts_details(
        hiddens,
        weight,
        bias,
        temperature=temperature,
        pooling=pooling,
        pool_query=pool_query,
        slot_mask=slot_mask,
        row_mask=row_mask,
        clamp=clamp,
        straight_through=straight_through,
    ).routing


def temperature_softmax(logits: Tensor, temperature: float | Tensor = 1.0, *, clamp: float | None = None) -> Tensor:
    """(..., K) -> (..., K): softmax(clamp(logits) / temperature) in the dtype of ``logits``."""
    z = clamp_logits(logits.to(compute_dtype(logits)), clamp)
    return tempered_softmax(z, temperature).to(logits.dtype)


def routing_entropy(probs: Tensor) -> Tensor:
    """(..., K) -> (...) float32: -sum p ln(p + 1e-10), finite in value and gradient at p = 0."""
    p = probs.to(compute_dtype(probs))
    return -(p * torch.log(p + ENTROPY_EPS)).sum(-1)


def load_balance_terms(probs: Tensor, row_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows that count: (K,) how often each expert is the argmax, (K,) its probability, () the rows."""
    p = probs.to(compute_dtype(probs))
    experts = torch.arange(p.shape[-1], device=p.device)
    top = (p.detach().argmax(-1, keepdim=True) == experts).to(p.dtype)
    if row_mask is None:
        rows = torch.full((), p.shape[0], dtype=p.dtype, device=p.device)
        return top.sum(0), p.sum(0), rows
    counted = row_mask[:, None]
    return torch.where(counted, top, 0.0).sum(0), torch.where(counted, p, 0.0).sum(0), row_mask.sum().to(p.dtype)


def load_balance_from_terms(counts: Tensor, mass: Tensor, rows: Tensor) -> Tensor:
    """K * sum_i f_i P_i from :func:`load_balance_terms`; 0 without rows."""
    rows = rows.clamp(min=1.0)
    return counts.shape[0] * ((counts / rows) * (mass / rows)).sum()


def load_balance_loss(probs: Tensor, *, row_mask: Tensor | None = None) -> Tensor:
    """(B, K) -> () float32: K * sum_i f_i P_i; the gradient flows through the mean probabilities P alone."""
    return load_balance_from_terms(*load_balance_terms(probs, row_mask))
