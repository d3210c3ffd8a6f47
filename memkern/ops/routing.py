"""Routing: pool the write slots of a row, project them to expert logits, softmax with a temperature, balance the load.

Raw operators, each ``memkern::<name>_<backend>`` for cpp, triton and cuda, f = float32 (float64 for float64):

- ``route_experts_fwd`` returns (probs, logits, entropy, loss) and, when ``save`` is set, what backward reads:
  raw (B, K) f, the logits before the clamp; saved_pool, (B, D) f pooled rows, or for max pooling (B, D) int32 positions
  of the maxima (-1: no slot), or empty when S == 1, where the row is ``hiddens`` itself; slot_weights (B, S) f,
  attention only; loss_weights (K,) f = K f_i / rows; zero_rows (B,) bool. Saved state stays below 4 B (D + 4 K) bytes
  plus attention weights.
- ``route_experts_bwd`` recomputes the probabilities from raw.
- ``temperature_softmax``, ``routing_entropy`` and ``load_balance_loss``, forward and backward, on rows of K values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memkern import backends
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._collectives import global_sum
from memkern.ops._library import accumulator, define, needs_reference
from memkern.reference import routing as reference
from memkern.reference.routing import Routing

__all__ = ["Routing", "load_balance_loss", "route_experts", "routing_entropy", "temperature_softmax"]

POOLINGS = ("mean", "max", "attention")
MAX_EXPERTS = 256
_POOLING_CODE = {"mean": 0, "max": 1, "attention": 2}
_OFF = float("inf")


def _route_experts_fwd_fake(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    pooling: int,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    clamp: float,
    save: bool,
) -> tuple[Tensor, ...]:
    rows, slots, width = hiddens.shape
    experts, f = weight.shape[0], accumulator(hiddens)
    empty = hiddens.new_empty((0,), dtype=f)
    saved_pool = empty
    if save and slots != 1:
        saved_pool = hiddens.new_empty((rows, width), dtype=torch.int32 if pooling == 1 else f)
    return (
        hiddens.new_empty((rows, experts)),
        hiddens.new_empty((rows, experts), dtype=f),
        hiddens.new_empty((rows,), dtype=f),
        hiddens.new_empty((), dtype=f),
        hiddens.new_empty((rows, experts), dtype=f) if save else empty.clone(),
        saved_pool,
        hiddens.new_empty((rows, slots), dtype=f) if save and pooling == 2 else empty.clone(),
        hiddens.new_empty((experts,), dtype=f) if save else empty.clone(),
        hiddens.new_empty((rows if save else 0,), dtype=torch.bool),
    )


def _route_experts_bwd_fake(
    grad_probs: Tensor | None,
    grad_logits: Tensor | None,
    grad_entropy: Tensor | None,
    grad_loss: Tensor | None,
    hiddens: Tensor,
    weight: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    pooling: int,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    raw: Tensor,
    saved_pool: Tensor,
    slot_weights: Tensor,
    loss_weights: Tensor,
    zero_rows: Tensor,
    clamp: float,
    straight_through: bool,
    need_hiddens: bool,
    need_params: bool,
    need_temperature: bool,
) -> tuple[Tensor, ...]:
    width, experts, f = hiddens.shape[2], weight.shape[0], accumulator(hiddens)
    return (
        hiddens.new_empty(hiddens.shape if need_hiddens else (0,)),
        weight.new_empty((experts, width) if need_params else (0,)),
        hiddens.new_empty((experts,) if need_params else (0,), dtype=f),
        hiddens.new_empty(() if need_temperature else (0,), dtype=f),
        hiddens.new_empty((width,) if need_params and pooling == 2 else (0,), dtype=f),
    )


_ROUTE_FWD = define(
    "route_experts_fwd",
    "(Tensor hiddens, Tensor weight, Tensor? bias, Tensor? temperature, float temperature_value, int pooling, "
    "Tensor? pool_query, Tensor? slot_mask, Tensor? row_mask, float clamp, bool save) -> "
    "(Tensor probs, Tensor logits, Tensor entropy, Tensor loss, Tensor raw, Tensor saved_pool, Tensor slot_weights, "
    "Tensor loss_weights, Tensor zero_rows)",
    _route_experts_fwd_fake,
)
_ROUTE_BWD = define(
    "route_experts_bwd",
    "(Tensor? grad_probs, Tensor? grad_logits, Tensor? grad_entropy, Tensor? grad_loss, Tensor hiddens, Tensor weight, "
    "Tensor? temperature, float temperature_value, int pooling, Tensor? pool_query, Tensor? slot_mask, "
    "Tensor? row_mask, Tensor raw, Tensor saved_pool, Tensor slot_weights, Tensor loss_weights, Tensor zero_rows, "
    "float clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) -> "
    "(Tensor d_hiddens, Tensor d_weight, Tensor d_bias, Tensor d_temperature, Tensor d_pool_query)",
    _route_experts_bwd_fake,
)
_SOFTMAX_FWD = define(
    "temperature_softmax_fwd",
    "(Tensor logits, Tensor? temperature, float temperature_value, float clamp) -> Tensor",
    lambda logits, temperature, temperature_value, clamp: logits.new_empty(logits.shape),
    column="routing",
)
_SOFTMAX_BWD = define(
    "temperature_softmax_bwd",
    "(Tensor grad, Tensor logits, Tensor? temperature, float temperature_value, float clamp, bool need_temperature) -> "
    "(Tensor d_logits, Tensor d_temperature)",
    lambda grad, logits, temperature, temperature_value, clamp, need_temperature: (
        logits.new_empty(logits.shape),
        logits.new_empty(() if need_temperature else (0,), dtype=accumulator(logits)),
    ),
    column="routing",
)
_ENTROPY_FWD = define(
    "routing_entropy_fwd",
    "(Tensor probs) -> Tensor",
    lambda probs: probs.new_empty(probs.shape[:-1], dtype=accumulator(probs)),
    column="routing",
)
_ENTROPY_BWD = define(
    "routing_entropy_bwd",
    "(Tensor grad, Tensor probs) -> Tensor",
    lambda grad, probs: probs.new_empty(probs.shape),
    column="routing",
)
_BALANCE_FWD = define(
    "load_balance_loss_fwd",
    "(Tensor probs, Tensor? row_mask) -> (Tensor loss, Tensor loss_weights)",
    lambda probs, row_mask: (
        probs.new_empty((), dtype=accumulator(probs)),
        probs.new_empty((probs.shape[1],), dtype=accumulator(probs)),
    ),
    column="routing",
)
_BALANCE_BWD = define(
    "load_balance_loss_bwd",
    "(Tensor grad, Tensor probs, Tensor? row_mask, Tensor loss_weights) -> Tensor",
    lambda grad, probs, row_mask, loss_weights: probs.new_empty(probs.shape),
    column="routing",
)

_WIDEST_ROW = 8192


def _row_limit(rows: Tensor, *_: Any) -> str | None:
    if rows.shape[-1] <= _WIDEST_ROW:
        return None
    return f"triton keeps a row in registers: K <= {_WIDEST_ROW}, not {rows.shape[-1]}"


backends.declare("route_experts", cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)
for _op in ("temperature_softmax", "routing_entropy", "load_balance_loss"):
    backends.declare(_op, cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW, limits={"triton": _row_limit})


def _cast(grad: Tensor, like: Tensor | None) -> Tensor | None:
    if like is None or grad.dtype is like.dtype:
        return None if like is None else grad
    return grad.to(like.dtype)


def _requires_grad(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad


class _RouteExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        hiddens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor | None,
        temperature_value: float,
        pooling: str,
        pool_query: Tensor | None,
        slot_mask: Tensor | None,
        row_mask: Tensor | None,
        clamp: float | None,
        straight_through: bool,
        with_zero_rows: bool,
    ) -> tuple[Tensor, ...]:
        limit = _OFF if clamp is None else clamp
        code = _POOLING_CODE[pooling] if hiddens.shape[1] != 1 else 0
        probs, logits, entropy, loss, raw, saved_pool, slot_weights, loss_weights, zero_rows = _ROUTE_FWD[backend](
            hiddens, weight, bias, temperature, temperature_value, code, pool_query, slot_mask, row_mask, limit, True
        )
        # What is empty is not saved: each saved tensor costs about a microsecond.
        ctx.save_for_backward(
            hiddens, weight, bias, temperature, pool_query, slot_mask, row_mask,
            raw, saved_pool, slot_weights if code == 2 else None, loss_weights, zero_rows,
        )  # fmt: skip
        ctx.backend, ctx.temperature_value, ctx.pooling, ctx.code = backend, temperature_value, pooling, code
        ctx.clamp, ctx.straight_through = clamp, straight_through
        ctx.set_materialize_grads(False)
        # The temperature comes after the logits: alone, it makes none of them differentiable.
        fixed: tuple[Tensor, ...] = (zero_rows,) if with_zero_rows else ()
        if not (hiddens.requires_grad or weight.requires_grad or _requires_grad(bias) or _requires_grad(pool_query)):
            fixed = (*fixed, logits)
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        return (probs, logits, entropy, loss, zero_rows) if with_zero_rows else (probs, logits, entropy, loss)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad_probs: Tensor | None,
        grad_logits: Tensor | None,
        grad_entropy: Tensor | None,
        grad_loss: Tensor | None,
        grad_zero_rows: None = None,
    ) -> tuple[Tensor | None, ...]:
        (
            hiddens, weight, bias, temperature, pool_query, slot_mask, row_mask,
            raw, saved_pool, slot_weights, loss_weights, zero_rows,
        ) = ctx.saved_tensors  # fmt: skip
        _, need_h, need_w, need_b, need_t, _, _, need_q, *_ = ctx.needs_input_grad
        grads = (grad_probs, grad_logits, grad_entropy, grad_loss)
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            outputs = reference.route_experts(
                hiddens,
                weight,
                bias,
                temperature=ctx.temperature_value if temperature is None else temperature,
                pooling=ctx.pooling,
                pool_query=pool_query,
                slot_mask=slot_mask,
                row_mask=row_mask,
                clamp=ctx.clamp,
                straight_through=ctx.straight_through,
            )
            wanted = ((hiddens, need_h), (weight, need_w), (bias, need_b), (temperature, need_t), (pool_query, need_q))
            d_hiddens, d_weight, d_bias, d_temperature, d_query = differentiable_backward(outputs, grads, wanted)
            return (None, d_hiddens, d_weight, d_bias, d_temperature, None, None, d_query, None, None, None, None, None)
        d_hiddens, d_weight, d_bias, d_temperature, d_query = _ROUTE_BWD[ctx.backend](
            *grads,
            hiddens, weight, temperature, ctx.temperature_value, ctx.code, pool_query, slot_mask, row_mask,
            raw, saved_pool, raw if slot_weights is None else slot_weights, loss_weights, zero_rows,
            _OFF if ctx.clamp is None else ctx.clamp, ctx.straight_through, need_h, need_w or need_b or need_q, need_t,
        )  # fmt: skip
        if need_q and ctx.code != 2:
            d_query = torch.zeros_like(pool_query)
        return (
            None,
            d_hiddens if need_h else None,
            d_weight if need_w else None,
            _cast(d_bias, bias) if need_b else None,
            _cast(d_temperature, temperature) if need_t else None,
            None,
            None,
            _cast(d_query, pool_query) if need_q else None,
            None,
            None,
            None,
            None,
            None,
        )


def _check_route(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    pooling: str,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    clamp: float | None,
    process_group: ProcessGroup | None,
) -> None:
    """Every check of route_experts, with its message; :func:`_plainly_fine` decides whether it has to run."""
    _checks.floating("hiddens", hiddens, ("B", "S", "D"))
    rows, slots, width = hiddens.shape
    _checks.floating("weight", weight, ("K", width), hiddens, "hiddens")
    experts = weight.shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        _checks.fail("weight", f"1 <= K <= {MAX_EXPERTS} rows", weight)
    if bias is not None:
        _checks.floating("bias", bias, (experts,), hiddens, "hiddens")
    _checks.temperature(temperature, hiddens, "hiddens")
    _checks.choice("pooling", pooling, POOLINGS)
    if pooling == "attention":
        if pool_query is None:
            _checks.fail("pool_query", f"a ({width},) tensor for pooling='attention'", pool_query)
        _checks.floating("pool_query", pool_query, (width,), hiddens, "hiddens")
    elif pool_query is not None:
        _checks.fail("pool_query", f"None for pooling={pooling!r}", pool_query)
    if slot_mask is not None:
        _checks.mask("slot_mask", slot_mask, (rows, slots), hiddens, "hiddens")
    if row_mask is not None:
        _checks.mask("row_mask", row_mask, (rows,), hiddens, "hiddens")
    _check_clamp(clamp)
    _check_group(process_group)


def _check_clamp(clamp: float | None) -> None:
    if clamp is None:
        return
    if isinstance(clamp, bool) or not isinstance(clamp, int | float):
        _checks.fail_type("clamp", "a float or None", clamp)
    if not clamp > 0:
        _checks.fail("clamp", "a number > 0, or None for no clamp", clamp)


def _check_group(process_group: ProcessGroup | None) -> None:
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        _checks.fail_type("process_group", "a torch.distributed.ProcessGroup or None", process_group)


def _plainly_fine(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, clamp: float | None
) -> bool:
    """The frequent case in a handful of comparisons: float32 mean pooling without masks. False means: look closer."""
    if not (type(hiddens) is Tensor and type(weight) in _checks._PLAIN and hiddens.dim() == 3 and weight.dim() == 2):
        return False
    experts, width = weight.shape
    return (
        type(temperature) is float
        and 0.0 < temperature < _OFF
        and (clamp is None or (type(clamp) is float and clamp > 0.0))
        and hiddens.dtype is weight.dtype is torch.float32
        and width == hiddens.shape[2]
        and 0 < experts <= MAX_EXPERTS
        and ((hiddens.is_cpu and weight.is_cpu) or weight.device == hiddens.device)
        and (
            bias is None
            or (
                type(bias) in _checks._PLAIN
                and bias.dtype is torch.float32
                and bias.dim() == 1
                and bias.numel() == experts
                and ((hiddens.is_cpu and bias.is_cpu) or bias.device == hiddens.device)
            )
        )
    )


def _check_route_values(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, temperature: Any, pool_query: Tensor | None, slots: Any
) -> None:
    _checks.no_nan("hiddens", hiddens, None if slots is None else slots[..., None])
    for name, value in (("weight", weight), ("bias", bias), ("pool_query", pool_query)):
        _checks.no_nan(name, value)
    if isinstance(temperature, Tensor):
        _checks.positive("temperature", temperature)


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
    # The frequent call passes with few comparisons; everything else gets the full checks and their messages.
    if not (
        pooling == "mean"
        and pool_query is None
        and slot_mask is None
        and row_mask is None
        and process_group is None
        and _plainly_fine(hiddens, weight, bias, temperature, clamp)
    ):
        _check_route(hiddens, weight, bias, temperature, pooling, pool_query, slot_mask, row_mask, clamp, process_group)
    if _checks.values_enabled():
        _check_route_values(hiddens, weight, bias, temperature, pool_query, slot_mask)
    chosen = backends.select("route_experts", backend, hiddens, weight, bias)
    if chosen == "reference" or needs_reference():
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
        return details.routing._replace(load_balance_loss=_global_loss(details.probs, row_mask, process_group))
    if type(temperature) is float:  # ahead of isinstance, which asks the metaclass of Tensor
        tensor, value = None, temperature
    elif isinstance(temperature, Tensor):
        tensor, value = temperature, 1.0
    else:
        tensor, value = None, float(temperature)
    if process_group is None and not gradient_needed(hiddens, weight, bias, tensor, pool_query):
        # One slot is its own mean, maximum and attention.
        code = _POOLING_CODE[pooling] if hiddens.shape[1] != 1 else 0
        limit = _OFF if clamp is None else float(clamp)
        outputs = _ROUTE_FWD[chosen](
            hiddens, weight, bias, tensor, value, code, pool_query, slot_mask, row_mask, limit, False
        )
        return Routing(outputs[0], outputs[1], outputs[2], outputs[3])
    bound = None if clamp is None else float(clamp)
    probs, logits, entropy, loss, *zero_rows = _RouteExperts.apply(
        chosen, hiddens, weight, bias, tensor, value, pooling, pool_query, slot_mask, row_mask, bound, straight_through,
        process_group is not None,
    )  # fmt: skip
    if process_group is not None:
        # The kernel's loss is this rank's; the global one starts from the unrounded probabilities, as the kernel's
        # does.
        routed = temperature_softmax(logits, temperature, backend=chosen)
        unrounded = torch.where(zero_rows[0][:, None], 1.0 / weight.shape[0], routed)
        loss = _global_loss(unrounded, row_mask, process_group)
    return Routing(probs, logits, entropy, loss)


def _global_loss(probs: Tensor, row_mask: Tensor | None, group: ProcessGroup) -> Tensor:
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
        limit = _OFF if clamp is None else clamp
        return _SOFTMAX_FWD[backend](logits, temperature, value, limit)

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
        limit = _OFF if ctx.clamp is None else ctx.clamp
        d_logits, d_t = _SOFTMAX_BWD[ctx.backend](grad, logits, temperature, ctx.value, limit, need_t)
        return None, d_logits if need_logits else None, _cast(d_t, temperature) if need_t else None, None, None


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
    _check_rows("logits", logits)
    _checks.temperature(temperature, logits, "logits")
    _check_clamp(clamp)
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
    return _SOFTMAX_FWD[chosen](logits, tensor, value, _OFF if limit is None else limit)


class _RoutingEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, probs: Tensor) -> Tensor:
        ctx.save_for_backward(probs)
        ctx.backend = backend
        return _ENTROPY_FWD[backend](probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (probs,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *differentiable_backward([reference.routing_entropy(probs)], [grad], [(probs, True)])
        return None, _ENTROPY_BWD[ctx.backend](grad, probs)


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
    _check_rows("probs", probs)
    if _checks.values_enabled():
        _checks.probabilities("probs", probs)
    chosen = backends.select("routing_entropy", backend, probs)
    if chosen == "reference" or needs_reference():
        return reference.routing_entropy(probs)
    if gradient_needed(probs):
        return _RoutingEntropy.apply(chosen, probs)
    return _ENTROPY_FWD[chosen](probs)


class _LoadBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, probs: Tensor, row_mask: Tensor | None) -> Tensor:
        loss, loss_weights = _BALANCE_FWD[backend](probs, row_mask)
        ctx.save_for_backward(probs, row_mask, loss_weights)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        probs, row_mask, loss_weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            output = reference.load_balance_loss(probs, row_mask=row_mask)
            return None, *differentiable_backward([output], [grad], [(probs, True)]), None
        return None, _BALANCE_BWD[ctx.backend](grad, probs, row_mask, loss_weights), None


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
    _check_group(process_group)
    if probs.shape[1] == 0:
        _checks.fail("probs", "at least one expert (K >= 1)", probs)
    if _checks.values_enabled():
        _checks.probabilities("probs", probs if row_mask is None else probs[row_mask])
    chosen = backends.select("load_balance_loss", backend, probs)
    if process_group is not None:
        return _global_loss(probs, row_mask, process_group)
    if chosen == "reference" or needs_reference():
        return reference.load_balance_loss(probs, row_mask=row_mask)
    if gradient_needed(probs):
        return _LoadBalanceLoss.apply(chosen, probs, row_mask)
    return _BALANCE_FWD[chosen](probs, row_mask)[0]


def _check_rows(name: str, value: Any) -> None:
    value = _checks.tensor(name, value)
    if value.dtype not in _checks.FLOATS:
        _checks.fail(name, "a floating dtype (float32, bfloat16, float16 or float64)", value)
    if value.dim() < 1 or value.shape[-1] == 0:
        _checks.fail(name, "shape (..., K) with K >= 1", value)
