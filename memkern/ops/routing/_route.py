"""route_experts: the public function over the raw operator, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memkern import backends
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, direct_apply, gradient_needed
from memkern.ops._library import needs_reference
from memkern.ops.routing._arguments import NO_CLAMP, check_route, plainly_fine
from memkern.ops.routing._rows import cast, global_loss, temperature_softmax
from memkern.ops.routing._schemas import ROUTE_BWD, ROUTE_FWD, zero_rows_of
from memkern.reference import routing as reference
from memkern.reference.routing import Routing

POOLING_CODE = {"mean": 0, "max": 1, "attention": 2}


# What a call fixes beside its tensors, as one argument of the autograd function, which pays for each: backend,
# temperature, pooling, its code, clamp, straight_through, whether the rows that pooled to zero are wanted.
_Settings = tuple[str, float, str, int, float | None, bool, bool]


def _requires_grad(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad


class _RouteExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hiddens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor | None,
        pool_query: Tensor | None,
        slot_mask: Tensor | None,
        row_mask: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        backend, value, _, code, clamp, _, with_zero_rows = settings
        limit = NO_CLAMP if clamp is None else clamp
        probs, logits, entropy, loss, saved = ROUTE_FWD[backend](
            hiddens, weight, bias, temperature, value, code, pool_query, slot_mask, row_mask, limit, True
        )
        ctx.save_for_backward(hiddens, weight, bias, temperature, pool_query, slot_mask, row_mask, saved)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        outputs: tuple[Tensor, ...] = probs, logits, entropy, loss
        # The temperature comes after the logits: alone, it makes none of them differentiable.
        fixed: tuple[Tensor, ...] = ()
        if not (hiddens.requires_grad or weight.requires_grad or _requires_grad(bias) or _requires_grad(pool_query)):
            fixed = (logits,)
        if with_zero_rows:
            rows, slots, width = hiddens.shape
            zero_rows = zero_rows_of(saved, rows, slots, width, weight.shape[0], code)
            outputs, fixed = (*outputs, zero_rows), (*fixed, zero_rows)
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad_probs: Tensor | None,
        grad_logits: Tensor | None,
        grad_entropy: Tensor | None,
        grad_loss: Tensor | None,
        grad_zero_rows: None = None,
    ) -> tuple[Tensor | None, ...]:
        hiddens, weight, bias, temperature, pool_query, slot_mask, row_mask, saved = ctx.saved_tensors
        need_h, need_w, need_b, need_t, need_q, *_ = ctx.needs_input_grad
        backend, value, pooling, code, clamp, straight_through, _ = ctx.settings
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            outputs = reference.route_experts(
                hiddens,
                weight,
                bias,
                temperature=value if temperature is None else temperature,
                pooling=pooling,
                pool_query=pool_query,
                slot_mask=slot_mask,
                row_mask=row_mask,
                clamp=clamp,
                straight_through=straight_through,
            )
            grads = (grad_probs, grad_logits, grad_entropy, grad_loss)
            wanted = ((hiddens, need_h), (weight, need_w), (bias, need_b), (temperature, need_t), (pool_query, need_q))
            return *differentiable_backward(outputs, grads, wanted), None, None, None
        limit = NO_CLAMP if clamp is None else clamp
        if row_mask is not None and grad_probs is None and grad_logits is None and grad_entropy is None:
            # Zero times the NaN that a row outside the loss may hold is NaN in the weight's gradient.
            hiddens = torch.where(row_mask[:, None, None], hiddens, 0.0)
            saved = ROUTE_FWD[backend](
                hiddens, weight, bias, temperature, value, code, pool_query, slot_mask, row_mask, limit, True
            )[4]
        d_hiddens, d_weight, d_bias, d_temperature, d_query = ROUTE_BWD[backend](
            grad_probs, grad_logits, grad_entropy, grad_loss,
            hiddens, weight, temperature, value, code, pool_query, slot_mask, row_mask,
            saved, limit, straight_through, need_h, need_w or need_b or need_q, need_t,
        )  # fmt: skip
        if need_q and code != 2:
            d_query = torch.zeros_like(pool_query)
        return (
            d_hiddens if need_h else None,
            d_weight if need_w else None,
            cast(d_bias, bias) if need_b else None,
            cast(d_temperature, temperature) if need_t else None,
            cast(d_query, pool_query) if need_q else None,
            None,
            None,
            None,
        )


_apply_directly = direct_apply(_RouteExperts)


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
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Routing:
    """Route each row to experts: pool its slots, project, clamp, softmax with a temperature; entropy and balance loss.

    ``logits = clamp(W x + b, -clamp, clamp)`` with x the pooled row, ``probs = softmax(logits / temperature)``. A row
    whose pooled |x_d| < 1e-10 for every d, one whose slots are all masked among them, gets exactly 1/K, and its
    probabilities, entropy and share of the loss send no gradient to any input. NaN inputs propagate.

    Args:
        hiddens: (B, S, D) float; S slots a row, any strides.
        weight: (K, D) float, 1 <= K <= 256.
        bias: (K,) float.
        temperature: > 0, a float or a 0-d tensor on the device of ``hiddens`` (which may require a gradient).
        pooling: ``"mean"``; ``"max"``, ties to the lowest slot; or ``"attention"``, weights softmax_s(q . x_s /
            sqrt(D)).
        pool_query: (D,) float, the q of ``pooling="attention"``.
        slot_mask: (B, S) bool, True for slots that take part in the pooling.
        row_mask: (B,) bool, True for rows that count in the loss.
        clamp: bound of the logits, None for none.
        straight_through: pass gradients through a saturated clamp unchanged.
        process_group: compute the loss over the rows of all ranks of this group. Every rank returns the same loss; its
            gradient carries the factor world size, so that DDP's mean over ranks equals one process.
        backend: see :mod:`memkern.backends`.

    Returns:
        Routing: ``probs`` (B, K) in the dtype of ``hiddens``; ``logits`` (B, K), ``entropy`` (B,) in nats and
        ``load_balance_loss`` () in float32 (float64 for float64). The loss is K sum_i f_i P_i with f_i the share of
        rows whose argmax is i (ties to the lowest index, no gradient) and P_i the mean probability; 0 without rows.

    Raises:
        ValueError: wrong rank, size, dtype, device or value; the message names the argument.
        TypeError: an argument of the wrong type, a mask that is not bool, or a DTensor.
        BackendUnavailable: the explicit backend cannot take the call.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers" (2021), equations 1 and 4.
    """
    _checks.flag("straight_through", straight_through)
    if (
        pooling == "mean"
        and pool_query is None
        and slot_mask is None
        and row_mask is None
        and process_group is None
        and plainly_fine(hiddens, weight, bias, temperature, clamp)
    ):
        chosen, by_reference = backends.select_on_cpu("route_experts", backend, hiddens), False
        if chosen != "reference":
            # The shortest way: beside the kernel, which may take 6 us, every line counts.
            if gradient_needed(hiddens, weight, bias):
                settings = (chosen, temperature, pooling, 0, clamp, straight_through, False)
                return Routing(*_apply_directly(hiddens, weight, bias, None, None, None, None, settings))
            limit = NO_CLAMP if clamp is None else clamp
            probs, logits, entropy, loss, _ = ROUTE_FWD[chosen](
                hiddens, weight, bias, None, temperature, 0, None, None, None, limit, False
            )
            return Routing(probs, logits, entropy, loss)
    else:
        temperature = check_route(
            hiddens, weight, bias, temperature, pooling, pool_query, slot_mask, row_mask, clamp, process_group
        )
        chosen, by_reference = backends.select("route_experts", backend, hiddens, weight, bias), needs_reference()
    if by_reference or chosen == "reference":
        details = reference.route_experts_details(
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
        )
        if process_group is None:
            return details.routing
        return details.routing._replace(load_balance_loss=global_loss(details.probs, row_mask, process_group))
    if type(temperature) is float:  # ahead of isinstance, which asks the metaclass of Tensor
        tensor, value = None, temperature
    elif isinstance(temperature, Tensor):
        tensor, value = temperature, 1.0
    else:
        tensor, value = None, float(temperature)
    bound = None if clamp is None else float(clamp)
    # One slot is its own mean, maximum and attention. The mean needs no look at the shape, which costs half a
    # microsecond.
    code = 0 if pooling == "mean" or hiddens.shape[1] == 1 else POOLING_CODE[pooling]
    if process_group is None and not gradient_needed(hiddens, weight, bias, tensor, pool_query):
        outputs = ROUTE_FWD[chosen](
            hiddens, weight, bias, tensor, value, code, pool_query, slot_mask, row_mask,
            NO_CLAMP if bound is None else bound, False,
        )  # fmt: skip
        return Routing(outputs[0], outputs[1], outputs[2], outputs[3])
    settings = (chosen, value, pooling, code, bound, straight_through, process_group is not None)
    probs, logits, entropy, loss, *zero_rows = _RouteExperts.apply(
        hiddens, weight, bias, tensor, pool_query, slot_mask, row_mask, settings
    )
    if process_group is not None:
        # The kernel's loss is this rank's; the global one starts from the unrounded probabilities, as the kernel's
        # does.
        routed = temperature_softmax(logits, temperature, backend=chosen)
        unrounded = torch.where(zero_rows[0][:, None], 1.0 / weight.shape[0], routed)
        loss = global_loss(unrounded, row_mask, process_group)
    return Routing(probs, logits, entropy, loss)
