"""Launchers of the routing column, each the raw operator of its name; memkern/ops/routing has the contract."""

from ._backward import route_experts_bwd
from ._forward import route_experts_fwd
from ._row_ops import (
    load_balance_loss_bwd,
    load_balance_loss_fwd,
    routing_entropy_bwd,
    routing_entropy_fwd,
    temperature_softmax_bwd,
    temperature_softmax_fwd,
)

__all__ = [
    "load_balance_loss_bwd",
    "load_balance_loss_fwd",
    "route_experts_bwd",
    "route_experts_fwd",
    "routing_entropy_bwd",
    "routing_entropy_fwd",
    "temperature_softmax_bwd",
    "temperature_softmax_fwd",
]
