"""The public operators, one module per column; see :mod:`memkern.backends` for what runs where."""

from memkern.ops import routing
from memkern.ops.cosine_topk import TopK, cosine_topk, inverse_norms
from memkern.ops.routing import (
    Routing,
    load_balance_loss,
    route_experts,
    routing_entropy,
    temperature_softmax,
)

__all__ = [
    "Routing",
    "TopK",
    "cosine_topk",
    "inverse_norms",
    "load_balance_loss",
    "route_experts",
    "routing",
    "routing_entropy",
    "temperature_softmax",
]
