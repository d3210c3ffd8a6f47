"""Routing: pool the write slots of a row, project them to logits, softmax with a temperature, balance the load."""

from memkern.ops.routing._route import route_experts
from memkern.ops.routing._rows import load_balance_loss, routing_entropy, temperature_softmax
from memkern.reference.routing import Routing

__all__ = ["Routing", "load_balance_loss", "route_experts", "routing_entropy", "temperature_softmax"]
