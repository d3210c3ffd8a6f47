"""Raw operators of the routing column, each ``memkern::<name>_<backend>`` for cpp, triton and cuda.

f = float32 (float64 for float64).

- ``route_experts_fwd`` returns (probs, logits, entropy, loss, saved). ``saved`` is empty unless ``save`` is set. Then
  it holds in one buffer of f, each part at a multiple of 16 elements, what backward reads: raw (B, K), the logits
  before the clamp; pool, (B, D) pooled rows, or for max pooling (B, D) int32 positions of the maxima (-1: no slot), or
  nothing when S == 1, where the row is ``hiddens`` itself; slot_weights (B, S), attention only; loss_weights (K,) =
  K f_i / rows; zero_rows, B bytes. One buffer, because each tensor costs a microsecond to return, keep and hand back.
  It stays below 4 B (D + 4 K) bytes plus attention weights and padding.
- ``route_experts_bwd`` recomputes the probabilities from raw. The bias's, the temperature's and the query's gradient
  come in f.
- ``temperature_softmax``, ``routing_entropy`` and ``load_balance_loss``, forward and backward, on rows of K values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkern import backends
from memkern.ops._library import accumulator, define


def saved_parts(rows: int, slots: int, width: int, experts: int, pooling: int) -> list[int]:
    """Elements of the parts of ``saved`` in their order, padding included."""
    counts = (
        rows * experts,
        rows * width if slots != 1 else 0,
        rows * slots if pooling == 2 else 0,
        experts,
        (rows + 3) // 4,
    )
    return [(count + 15) // 16 * 16 for count in counts]


def zero_rows_of(saved: Tensor, rows: int, slots: int, width: int, experts: int, pooling: int) -> Tensor:
    """(B,) bool: the rows that pooled to zero."""
    first = sum(saved_parts(rows, slots, width, experts, pooling)[:-1])
    return saved[first:].view(torch.uint8)[:rows] != 0


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
    size = sum(saved_parts(rows, slots, width, experts, pooling)) if save else 0
    return (
        hiddens.new_empty((rows, experts)),
        hiddens.new_empty((rows, experts), dtype=f),
        hiddens.new_empty((rows,), dtype=f),
        hiddens.new_empty((), dtype=f),
        hiddens.new_empty((size,), dtype=f),
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
    saved: Tensor,
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


ROUTE_FWD = define(
    "route_experts_fwd",
    "(Tensor hiddens, Tensor weight, Tensor? bias, Tensor? temperature, float temperature_value, int pooling, "
    "Tensor? pool_query, Tensor? slot_mask, Tensor? row_mask, float clamp, bool save) -> "
    "(Tensor probs, Tensor logits, Tensor entropy, Tensor loss, Tensor saved)",
    _route_experts_fwd_fake,
    column="routing",
)
ROUTE_BWD = define(
    "route_experts_bwd",
    "(Tensor? grad_probs, Tensor? grad_logits, Tensor? grad_entropy, Tensor? grad_loss, Tensor hiddens, Tensor weight, "
    "Tensor? temperature, float temperature_value, int pooling, Tensor? pool_query, Tensor? slot_mask, "
    "Tensor? row_mask, Tensor saved, "
    "float clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) -> "
    "(Tensor d_hiddens, Tensor d_weight, Tensor d_bias, Tensor d_temperature, Tensor d_pool_query)",
    _route_experts_bwd_fake,
    column="routing",
)
SOFTMAX_FWD = define(
    "temperature_softmax_fwd",
    "(Tensor logits, Tensor? temperature, float temperature_value, float clamp) -> Tensor",
    lambda logits, temperature, temperature_value, clamp: logits.new_empty(logits.shape),
    column="routing",
)
SOFTMAX_BWD = define(
    "temperature_softmax_bwd",
    "(Tensor grad, Tensor logits, Tensor? temperature, float temperature_value, float clamp, bool need_temperature) -> "
    "(Tensor d_logits, Tensor d_temperature)",
    lambda grad, logits, temperature, temperature_value, clamp, need_temperature: (
        logits.new_empty(logits.shape),
        logits.new_empty(() if need_temperature else (0,), dtype=accumulator(logits)),
    ),
    column="routing",
)
ENTROPY_FWD = define(
    "routing_entropy_fwd",
    "(Tensor probs) -> Tensor",
    lambda probs: probs.new_empty(probs.shape[:-1], dtype=accumulator(probs)),
    column="routing",
)
ENTROPY_BWD = define(
    "routing_entropy_bwd",
    "(Tensor grad, Tensor probs) -> Tensor",
    lambda grad, probs: probs.new_empty(probs.shape),
    column="routing",
)
BALANCE_FWD = define(
    "load_balance_loss_fwd",
    "(Tensor probs, Tensor? row_mask) -> (Tensor loss, Tensor loss_weights)",
    lambda probs, row_mask: (
        probs.new_empty((), dtype=accumulator(probs)),
        probs.new_empty((probs.shape[1],), dtype=accumulator(probs)),
    ),
    column="routing",
)
BALANCE_BWD = define(
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
