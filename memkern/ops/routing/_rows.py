"""temperature_softmax, routing_entropy and load_balance_loss: rows of K values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memkern import backends
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._collectives import global_sum
from memkern.ops._library import needs_reference
from memkern.ops.routing._arguments import NO_CLAMP, check_clamp, check_group, check_rows
from memkern.ops.routing._schemas import (
    BALANCE_BWD,
    BALANCE_FWD,
    ENTROPY_BWD,
    ENTROPY_FWD,
    SOFTMAX_BWD,
    SOFTMAX_FWD,
)
from memkern.reference import routing as reference


def cast(grad: Tensor, like: Tensor | None) -> Tensor | None:
    if like is None or grad.dtype is like.dtype:
        return None if like is None else grad
    return grad.to(like.dtype)


def global_loss(probs: Tensor, row_mask: Tensor | None, group: ProcessGroup) -> Tensor:
    counts, mass, rows = reference.load_balance_terms(probs, row_mask)
    experts = counts.shape[0]
    terms = global_sum(torch.cat((counts, mass, rows[None])), group)
    return reference.load_balance_from_terms(terms[:experts], terms[experts : 2 * experts], terms[2 * experts])


class _TemperatureSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, logits: Tensor, temperature: Tensor | None, value: float, clamp: float | None
    ) -> Tensor:
        ctx.save_for_backward(logits, temperature)
        ctx.backend, ctx.value, ctx.clamp = backend, value, clamp
        limit = NO_CLAMP if clamp is None else clamp
        return SOFTMAX_FWD[backend](logits, temperature, value, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, temperature = ctx.saved_tensors
        _, need_logits, need_t, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            output = reference.temperature_softmax(
                logits, ctx.value if temperature is None else temperature, clamp=ctx.clamp
            )
            d_logits, d_t = differentiable_backward([output], [grad], [(logits, need_logits), (temperature, need_t)])
            return None, d_logits, d_t, None, None
        limit = NO_CLAMP if ctx.clamp is None else ctx.clamp
        d_logits, d_t = SOFTMAX_BWD[ctx.backend](grad, logits, temperature, ctx.value, limit, need_t)
        return None, d_logits if need_logits else None, cast(d_t, temperature) if need_t else None, None, None


def temperature_softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, *, clamp: float | None = None, backend: str | None = None
) -> Tensor:
    """softmax(clamp(logits) / temperature) over the last axis.

    Args:
        logits: (..., K) float.
        temperature: > 0, a float or a 0-d tensor on the device of ``logits``.
        clamp: bound of the logits before the temperature, None for none.
        backend: see :mod:`memkern.backends`.

    Returns:
        (..., K) in the dtype of ``logits``.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    check_rows("logits", logits)
    temperature = _checks.temperature(temperature, logits, "logits")
    check_clamp(clamp)
    if _checks.values_enabled():
        _checks.no_nan("logits", logits)
        if isinstance(temperature, Tensor):
            _checks.positive("temperature", temperature)
    chosen = backends.select("temperature_softmax", backend, logits)
    if chosen == "reference" or needs_reference():
        return reference.temperature_softmax(logits, temperature, clamp=clamp)
    tensor, value = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    limit = None if clamp is None else float(clamp)
    if gradient_needed(logits, tensor):
        return _TemperatureSoftmax.apply(chosen, logits, tensor, value, limit)
    return SOFTMAX_FWD[chosen](logits, tensor, value, NO_CLAMP if limit is None else limit)


class _RoutingEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, probs: Tensor) -> Tensor:
        ctx.save_for_backward(probs)
        ctx.backend = backend
        return ENTROPY_FWD[backend](probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (probs,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *differentiable_backward([reference.routing_entropy(probs)], [grad], [(probs, True)])
        return None, ENTROPY_BWD[ctx.backend](grad, probs)


def routing_entropy(probs: Tensor, *, backend: str | None = None) -> Tensor:
    """-sum p ln(p + 1e-10) over the last axis, in nats; value and gradient are finite at p = 0.

    Args:
        probs: (..., K) float.
        backend: see :mod:`memkern.backends`.

    Returns:
        (...) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    check_rows("probs", probs)
    if _checks.values_enabled():
        _checks.probabilities("probs", probs)
    chosen = backends.select("routing_entropy", backend, probs)
    if chosen == "reference" or needs_reference():
        return reference.routing_entropy(probs)
    if gradient_needed(probs):
        return _RoutingEntropy.apply(chosen, probs)
    return ENTROPY_FWD[chosen](probs)


class _LoadBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, probs: Tensor, row_mask: Tensor | None) -> Tensor:
        loss, loss_weights = BALANCE_FWD[backend](probs, row_mask)
        ctx.save_for_backward(probs, row_mask, loss_weights)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        probs, row_mask, loss_weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            output = reference.load_balance_loss(probs, row_mask=row_mask)
            return None, *differentiable_backward([output], [grad], [(probs, True)]), None
        return None, BALANCE_BWD[ctx.backend](grad, probs, row_mask, loss_weights), None


def load_balance_loss(
    probs: Tensor,
    *,
    row_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """K * sum_i f_i P_i: 1 when the experts are used evenly, K when one takes all rows, 0 without rows.

    f_i is the share of rows whose argmax is i (ties to the lowest index, no gradient), P_i the mean probability.

    Args:
        probs: (B, K) float, rows that sum to 1.
        row_mask: (B,) bool, True for rows that count.
        process_group: take f and P over the rows of all ranks; see :func:`route_experts`.
        backend: see :mod:`memkern.backends`.

    Returns:
        () float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a bad argument, named.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers" (2021), equation 4.
    """
    _checks.floating("probs", probs, ("B", "K"))
    if row_mask is not None:
        _checks.mask("row_mask", row_mask, (probs.shape[0],), probs, "probs")
    check_group(process_group)
    if probs.shape[1] == 0:
        _checks.fail("probs", "at least one expert (K >= 1)", probs)
    if _checks.values_enabled():
        _checks.probabilities("probs", probs if row_mask is None else probs[row_mask])
    chosen = backends.select("load_balance_loss", backend, probs)
    if process_group is not None:
        return global_loss(probs, row_mask, process_group)
    if chosen == "reference" or needs_reference():
        return reference.load_balance_loss(probs, row_mask=row_mask)
    if gradient_needed(probs):
        return _LoadBalanceLoss.apply(chosen, probs, row_mask)
    return BALANCE_FWD[chosen](probs, row_mask)[0]
