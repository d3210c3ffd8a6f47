"""The public operators, one module per column; see :mod:`memkern.backends` for what runs where."""

import sys as _sys

from memkern.ops import expert_update, memory, retrieval, routing
from memkern.ops.cosine_topk import TopK, cosine_topk, inverse_norms
from memkern.ops.expert_update import aggregate_experts, gather_slots, scatter_slots, update_experts
from memkern.ops.memory import (
    MemoryInterface,
    MemoryState,
    allocation_weights,
    content_weights,
    directional_weights,
    initial_memory_state,
    memory_scan,
    memory_step,
    read_memory,
    sharpen,
    update_links,
    update_usage,
    write_memory,
)
from memkern.ops.retrieval import fuse_sources, retrieved_attention, span_loss
from memkern.ops.routing import (
    Routing,
    load_balance_loss,
    route_experts,
    routing_entropy,
    temperature_softmax,
)

# ``memkern.ops.cosine_topk`` is a module and its function at once: as the function it carries the module's other names,
# so that both ``cosine_topk(...)`` and ``cosine_topk.inverse_norms(...)`` are right, however it was imported.
for _name in _sys.modules["memkern.ops.cosine_topk"].__all__:
    setattr(cosine_topk, _name, getattr(_sys.modules["memkern.ops.cosine_topk"], _name))

__all__ = [
    "MemoryInterface",
    "MemoryState",
    "Routing",
    "TopK",
    "aggregate_experts",
    "allocation_weights",
    "content_weights",
    "cosine_topk",
    "directional_weights",
    "expert_update",
    "fuse_sources",
    "gather_slots",
    "initial_memory_state",
    "inverse_norms",
    "load_balance_loss",
    "memory",
    "memory_scan",
    "memory_step",
    "read_memory",
    "retrieval",
    "retrieved_attention",
    "route_experts",
    "routing",
    "routing_entropy",
    "scatter_slots",
    "sharpen",
    "span_loss",
    "temperature_softmax",
    "update_experts",
    "update_links",
    "update_usage",
    "write_memory",
]
