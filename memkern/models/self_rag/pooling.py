"""One vector out of a sequence of states, over the unmasked tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, T, D) -> (B, D): ``"mean"``, ``"last"``, or ``"cls"`` (also ``"first"``) over the unmasked tokens.

    Args:
        states: (B, T, D) float; what is masked may be NaN.
        attention_mask: (B, T) bool or 0/1, padding on either side or both; None for no padding. A row without any token
            gives zeros.
        pooling: as above.
    """
    rows, length, _ = states.shape
    if length == 0:
        return states.new_zeros(rows, states.shape[2])
    mask = states.new_ones((rows, length), dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling == "mean":
        kept = torch.where(mask[..., None], states, 0.0)
        return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(states.dtype)
    marks = mask.int()
    positions = length - 1 - marks.flip(1).argmax(1) if pooling == "last" else marks.argmax(1)
    chosen = states[torch.arange(rows, device=states.device), positions]
    return torch.where(mask.any(1, keepdim=True), chosen, 0.0)
