"""What the XLNet models return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class MemoryQAOutput(ModelOutput):
    """Spans, the new memory state, and the losses; as attributes, as dictionary keys, and as a tuple of what is there.

    A field that is absent answers its key with None.
    """

    loss: Tensor | None = None
    """() span loss plus the weighted auxiliary losses."""
    start_logits: Tensor | None = None
    """(B, T), or (B, N, T) for documents."""
    end_logits: Tensor | None = None
    """(B, T), or (B, N, T) for documents."""
    new_memory_state: Any = None
    """The state to pass on as ``memory_state``."""
    memory_info: dict[str, Tensor] | None = None
    """Differentiable memory: read_weights, write_weights, usage, temporal_links, memory_state, without graph."""
    routing_info: dict[str, Tensor] | None = None
    """GMM, on request: routing_probs, routing_logits, routing_entropy, expert_activations."""
    load_balance_loss: Tensor | None = None
    """() unweighted, GMM."""
    entropy_loss: Tensor | None = None
    """() minus the mean routing entropy, unweighted, GMM."""
    mems: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key not in self.keys() and key in _FIELDS:
            return None
        return super().__getitem__(key)


_FIELDS = {field.name for field in dataclasses.fields(MemoryQAOutput)}
