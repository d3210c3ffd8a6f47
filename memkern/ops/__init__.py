"""The public operators, one module per column; see :mod:`memkern.backends` for what runs where."""

from memkern.ops import routing
from memkern.ops.routing import (
    Routing,
    load_balance_loss,
    route_experts,
    routing_entropy,
    temperature_softmax,
)

__all__ = [
    "Routing",
    "load_balance_loss",
    "route_experts",
    "routing",
    "routing_entropy",
    "temperature_softmax",
]
