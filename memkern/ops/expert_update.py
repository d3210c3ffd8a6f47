"""Expert updates: gated mixes of expert states with the write slots, their weighted sum, and slots of a sequence.

Raw operators, each ``memkern::<name>_<backend>`` for cpp, triton and cuda, f = float32 (float64 for float64):

- ``update_experts_fwd`` -> (out (B, K, S, D) in the dtype of ``states``, gates, updates (B, S, K, D)); gates and
  updates are sigmoid and tanh of the pre-activations, kept for backward when ``save`` is set and empty otherwise, in
  the dtype of ``states`` when hiddens and weights share it, else f. What they hold in masked rows is no one's.
- ``update_experts_bwd`` recomputes gates and updates when they come empty. d_probs and the biases' gradients are f; a
  gradient that is not needed is empty.
- ``aggregate_experts_fwd``/``_bwd``; d_probs is f.
- ``gather_slots_fwd``/``_bwd`` and ``scatter_slots_fwd``/``_bwd`` compare ids as int64 and need no saved values; the
  gradient to ``slots`` is f.

A row with ``row_mask`` False, and an expert with p = 0, keep their state bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkern import backends
from memkern.ops import _checks, _expert_update_cpu
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._expert_update_cpu import saved_dtype
from memkern.ops._library import LIBRARY, accumulator, define, needs_reference
from memkern.reference import expert_update as reference

__all__ = ["aggregate_experts", "gather_slots", "scatter_slots", "update_experts"]

SAVES = ("activations", "none")


def _update_fwd_fake(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, experts, slots, width = states.shape
    kept, low = (
        (batch, slots, experts, width) if save else (0,),
        saved_dtype(states, hiddens, gate_weight, update_weight),
    )
    return states.new_empty(states.shape), states.new_empty(kept, dtype=low), states.new_empty(kept, dtype=low)


def _update_bwd_fake(
    grad: Tensor,
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    gates: Tensor,
    updates: Tensor,
    need_states: bool,
    need_hiddens: bool,
    need_probs: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    f, none = accumulator(states), (0,)
    biases = gate_weight.shape[:2] if need_params else none
    return (
        states.new_empty(states.shape if need_states else none),
        hiddens.new_empty(hiddens.shape if need_hiddens else none),
        probs.new_empty(probs.shape if need_probs else none, dtype=f),
        gate_weight.new_empty(gate_weight.shape if need_params else none),
        gate_weight.new_empty(biases, dtype=f),
        update_weight.new_empty(update_weight.shape if need_params else none),
        update_weight.new_empty(biases, dtype=f),
    )


_UPDATE_FWD = define(
    "update_experts_fwd",
    "(Tensor states, Tensor hiddens, Tensor probs, Tensor gate_weight, Tensor? gate_bias, Tensor update_weight, "
    "Tensor? update_bias, Tensor? row_mask, bool save) -> (Tensor out, Tensor gates, Tensor updates)",
    _update_fwd_fake,
)
_UPDATE_BWD = define(
    "update_experts_bwd",
    "(Tensor grad, Tensor states, Tensor hiddens, Tensor probs, Tensor gate_weight, Tensor? gate_bias, "
    "Tensor update_weight, Tensor? update_bias, Tensor? row_mask, Tensor gates, Tensor updates, bool need_states, "
    "bool need_hiddens, bool need_probs, bool need_params) -> (Tensor d_states, Tensor d_hiddens, Tensor d_probs, "
    "Tensor d_gate_weight, Tensor d_gate_bias, Tensor d_update_weight, Tensor d_update_bias)",
    _update_bwd_fake,
)
_AGGREGATE_FWD = define(
    "aggregate_experts_fwd",
    "(Tensor states, Tensor probs) -> Tensor",
    lambda states, probs: states.new_empty((states.shape[0], *states.shape[2:])),
    column="expert_update",
)
_AGGREGATE_BWD = define(
    "aggregate_experts_bwd",
    "(Tensor grad, Tensor states, Tensor probs, bool need_states, bool need_probs) -> "
    "(Tensor d_states, Tensor d_probs)",
    lambda grad, states, probs, need_states, need_probs: (
        states.new_empty(states.shape if need_states else (0,)),
        probs.new_empty(probs.shape if need_probs else (0,), dtype=accumulator(states)),
    ),
    column="expert_update",
)
_GATHER_FWD = define(
    "gather_slots_fwd",
    "(Tensor hiddens, Tensor input_ids, Tensor slot_ids) -> Tensor",
    lambda hiddens, input_ids, slot_ids: hiddens.new_empty((hiddens.shape[0], slot_ids.shape[0], hiddens.shape[2])),
    column="expert_update",
)
_GATHER_BWD = define(
    "gather_slots_bwd",
    "(Tensor grad, Tensor input_ids, Tensor slot_ids) -> Tensor",
    lambda grad, input_ids, slot_ids: grad.new_empty((*input_ids.shape, grad.shape[2])),
    column="expert_update",
)
_SCATTER_FWD = define(
    "scatter_slots_fwd",
    "(Tensor sequence, Tensor slots, Tensor input_ids, Tensor slot_ids) -> Tensor",
    lambda sequence, slots, input_ids, slot_ids: sequence.new_empty(sequence.shape),
    column="expert_update",
)
_SCATTER_BWD = define(
    "scatter_slots_bwd",
    "(Tensor grad, Tensor input_ids, Tensor slot_ids, bool need_sequence, bool need_slots) -> "
    "(Tensor d_sequence, Tensor d_slots)",
    lambda grad, input_ids, slot_ids, need_sequence, need_slots: (
        grad.new_empty(grad.shape if need_sequence else (0,)),
        grad.new_empty(
            (grad.shape[0], slot_ids.shape[0], grad.shape[2]) if need_slots else (0,), dtype=accumulator(grad)
        ),
    ),
    column="expert_update",
)

LIBRARY.impl("update_experts_fwd_cpp", _expert_update_cpu.update_experts_fwd, "CPU")
LIBRARY.impl("update_experts_bwd_cpp", _expert_update_cpu.update_experts_bwd, "CPU")

for _op in ("update_experts", "aggregate_experts", "gather_slots", "scatter_slots"):
    backends.declare(_op, cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)


def _cast(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else grad.to(like.dtype)


class _UpdateExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        states: Tensor,
        hiddens: Tensor,
        probs: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        update_weight: Tensor,
        update_bias: Tensor | None,
        row_mask: Tensor | None,
        save: bool,
    ) -> Tensor:
        inputs = (states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias, row_mask)
        out, gates, updates = _UPDATE_FWD[backend](*inputs, save)
        ctx.save_for_backward(*inputs, gates, updates)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, row_mask, gates, updates = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:8]
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            output = reference.update_experts(*inputs, row_mask=row_mask)
            wanted = list(zip(inputs, needs, strict=True))
            return None, *differentiable_backward([output], [grad], wanted), None, None
        need_m, need_h, need_p, need_gw, need_gb, need_uw, need_ub = needs
        found = _UPDATE_BWD[ctx.backend](
            grad, *inputs, row_mask, gates, updates, need_m, need_h, need_p, need_gw or need_gb or need_uw or need_ub
        )
        return (
            None,
            *(_cast(d, x) if need else None for d, x, need in zip(found, inputs, needs, strict=True)),
            None,
            None,
        )


def _check_update(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    save: str,
) -> None:
    _checks.floating("states", states, ("B", "K", "S", "D"))
    batch, experts, slots, width = states.shape
    _checks.floating("hiddens", hiddens, (batch, slots, width), states, "states")
    _checks.floating("probs", probs, (batch, experts), states, "states")
    for name, weight in (("gate_weight", gate_weight), ("update_weight", update_weight)):
        _checks.floating(name, weight, (experts, width, 2 * width), states, "states")
    for name, bias in (("gate_bias", gate_bias), ("update_bias", update_bias)):
        if bias is not None:
            _checks.floating(name, bias, (experts, width), states, "states")
    if row_mask is not None:
        _checks.mask("row_mask", row_mask, (batch,), states, "states")
    _checks.choice("save", save, SAVES)


def _check_update_values(
    states: Tensor, hiddens: Tensor, probs: Tensor, row_mask: Tensor | None, params: dict[str, Tensor | None]
) -> None:
    if row_mask is None:
        row_mask = torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
    _checks.no_nan("states", states, row_mask[:, None, None, None])
    _checks.no_nan("hiddens", hiddens, row_mask[:, None, None])
    _checks.first_bad("probs", ~((probs >= 0) & (probs <= 1)) & row_mask[:, None], "values in [0, 1]", probs)
    for name, value in params.items():
        _checks.no_nan(name, value)


def update_experts(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    *,
    row_mask: Tensor | None = None,
    save: str = "activations",
    backend: str | None = None,
) -> Tensor:
    """Mix every expert's state with an update from the write slots, as far as its gate and its probability let it.

    With M an expert's state and h the hiddens, ``g = sigmoid([M;h] Wg^T + bg)``, ``u = tanh([M;h] Wu^T + bu)``,
    ``a = p g`` and ``M' = a u + (1 - a) M``. The concatenation is never made, nor is the product of the hiddens' half
    repeated.

    Args:
        states: (B, K, S, D) float, any strides.
        hiddens: (B, S, D) float.
        probs: (B, K) float, the probability of each expert in [0, 1]; p = 0 keeps the state bit for bit.
        gate_weight: (K, D, 2D) float; columns [:D] act on the state, [D:] on the hidden.
        gate_bias: (K, D) float or None.
        update_weight: (K, D, 2D) float, columns as in ``gate_weight``.
        update_bias: (K, D) float or None.
        row_mask: (B,) bool; a row with False keeps its states bit for bit and sends no gradient elsewhere.
        save: what forward keeps for backward: ``"activations"`` g and u, twice the size of ``states``; ``"none"``
            nothing, backward computes them again.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, K, S, D) in the dtype of ``states``.

    Raises:
        ValueError: wrong rank, size, dtype, device or value; the message names the argument.
        TypeError: an argument of the wrong type, a mask that is not bool, or a DTensor.
        BackendUnavailable: the explicit backend cannot take the call.
    """
    inputs = (states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias)
    _check_update(*inputs, row_mask, save)
    if _checks.values_enabled():
        params = {
            "gate_weight": gate_weight,
            "gate_bias": gate_bias,
            "update_weight": update_weight,
            "update_bias": update_bias,
        }
        _check_update_values(states, hiddens, probs, row_mask, params)
    chosen = backends.select("update_experts", backend, *inputs)
    if chosen == "reference" or needs_reference():
        return reference.update_experts(*inputs, row_mask=row_mask)
    if gradient_needed(*inputs):
        return _UpdateExperts.apply(chosen, *inputs, row_mask, save == "activations")
    return _UPDATE_FWD[chosen](*inputs, row_mask, False)[0]


class _AggregateExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, states: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(states, probs)
        ctx.backend = backend
        return _AGGREGATE_FWD[backend](states, probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, probs = ctx.saved_tensors
        _, need_m, need_p = ctx.needs_input_grad
        if torch.is_grad_enabled():
            output = reference.aggregate_experts(states, probs)
            return None, *differentiable_backward([output], [grad], ((states, need_m), (probs, need_p)))
        d_states, d_probs = _AGGREGATE_BWD[ctx.backend](grad, states, probs, need_m, need_p)
        return None, d_states if need_m else None, _cast(d_probs, probs) if need_p else None


def aggregate_experts(states: Tensor, probs: Tensor, *, backend: str | None = None) -> Tensor:
    """sum_k p_k M_k: what a reader sees of all experts.

    Args:
        states: (B, K, S, D) float, any strides.
        probs: (B, K) float, weights in [0, 1].
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, S, D) in the dtype of ``states``.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    _checks.floating("states", states, ("B", "K", "S", "D"))
    _checks.floating("probs", probs, states.shape[:2], states, "states")
    if _checks.values_enabled():
        _checks.no_nan("states", states)
        _checks.in_range("probs", probs, 0.0, 1.0)
    chosen = backends.select("aggregate_experts", backend, states, probs)
    if chosen == "reference" or needs_reference():
        return reference.aggregate_experts(states, probs)
    if gradient_needed(states, probs):
        return _AggregateExperts.apply(chosen, states, probs)
    return _AGGREGATE_FWD[chosen](states, probs)


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, hiddens: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids, slot_ids)
        ctx.backend = backend
        return _GATHER_FWD[backend](hiddens, input_ids, slot_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Linear in hiddens, so that the gradient needs the ids alone, in the differentiable form too.
        if torch.is_grad_enabled():
            return None, reference.gather_slots_gradient(grad, *ctx.saved_tensors), None, None
        return None, _GATHER_BWD[ctx.backend](grad, *ctx.saved_tensors), None, None


def gather_slots(hiddens: Tensor, input_ids: Tensor, slot_ids: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of the hiddens at each slot's positions, those whose input id is the slot's; zero where there is none.

    Args:
        hiddens: (B, T, D) float, any strides.
        input_ids: (B, T) int64.
        slot_ids: (S,) int64; an id that occurs twice gets its mean twice.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, S, D) in the dtype of ``hiddens``.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    _checks.floating("hiddens", hiddens, ("B", "T", "D"))
    _check_ids(hiddens, "hiddens", input_ids, slot_ids)
    if _checks.values_enabled():
        _checks.no_nan("hiddens", hiddens, torch.isin(input_ids, slot_ids)[..., None])
    chosen = backends.select("gather_slots", backend, hiddens)
    if chosen == "reference" or needs_reference():
        return reference.gather_slots(hiddens, input_ids, slot_ids)
    if gradient_needed(hiddens):
        return _GatherSlots.apply(chosen, hiddens, input_ids, slot_ids)
    return _GATHER_FWD[chosen](hiddens, input_ids, slot_ids)


class _ScatterSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, sequence: Tensor, slots: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids, slot_ids)
        ctx.backend, ctx.slots_dtype = backend, slots.dtype
        return _SCATTER_FWD[backend](sequence, slots, input_ids, slot_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, need_sequence, need_slots, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            d_sequence, d_slots = reference.scatter_slots_gradient(grad, *ctx.saved_tensors)
        else:
            d_sequence, d_slots = _SCATTER_BWD[ctx.backend](grad, *ctx.saved_tensors, need_sequence, need_slots)
        return (
            None,
            d_sequence if need_sequence else None,
            d_slots.to(ctx.slots_dtype) if need_slots else None,
            None,
            None,
        )


def scatter_slots(
    sequence: Tensor, slots: Tensor, input_ids: Tensor, slot_ids: Tensor, *, backend: str | None = None
) -> Tensor:
    """A copy of the sequence whose rows at the slots' positions, those whose input id is a slot's, are the slots.

    Args:
        sequence: (B, T, D) float, any strides.
        slots: (B, S, D) float.
        input_ids: (B, T) int64.
        slot_ids: (S,) int64; one that is absent from the sequence changes nothing, of equal ones the first counts.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, T, D) in the dtype of ``sequence``. Replaced rows send no gradient to ``sequence``.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    _checks.floating("sequence", sequence, ("B", "T", "D"))
    _checks.floating("slots", slots, (sequence.shape[0], "S", sequence.shape[2]), sequence, "sequence")
    _check_ids(sequence, "sequence", input_ids, slot_ids, slots.shape[1])
    if _checks.values_enabled():
        _checks.no_nan("sequence", sequence, ~torch.isin(input_ids, slot_ids)[..., None])
        _checks.no_nan("slots", slots, (input_ids[..., None] == slot_ids).any(1)[..., None])
    chosen = backends.select("scatter_slots", backend, sequence, slots)
    if chosen == "reference" or needs_reference():
        return reference.scatter_slots(sequence, slots, input_ids, slot_ids)
    if gradient_needed(sequence, slots):
        return _ScatterSlots.apply(chosen, sequence, slots, input_ids, slot_ids)
    return _SCATTER_FWD[chosen](sequence, slots, input_ids, slot_ids)


def _check_ids(like: Tensor, name: str, input_ids: Any, slot_ids: Any, slots: int | str = "S") -> None:
    _checks.integer("input_ids", input_ids, like.shape[:2], like, name)
    _checks.integer("slot_ids", slot_ids, (slots,), like, name)
