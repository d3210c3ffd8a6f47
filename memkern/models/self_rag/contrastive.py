"""The InfoNCE loss between queries and the chunks that answer them (van den Oord et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def info_nce(scores: Tensor, positives: Tensor, temperature: float, allowed: Tensor | None = None) -> Tensor:
    """-log softmax(scores / temperature) at each row's positive, mean over the rows that have one.

    Args:
        scores: (B, C) similarities of B queries with C candidates.
        positives: (B,) int64 column of the chunk that answers, -1 for none.
        temperature: > 0.
        allowed: (B, C) bool, which candidates a row is contrasted with; the positive always is.

    Returns:
        () float; 0, still in the graph, when no row has a positive.
    """
    rows = positives >= 0
    column = positives.clamp(min=0)
    logits = scores.float() / temperature
    if allowed is not None and scores.shape[1]:
        allowed = allowed.scatter(1, column[:, None], True)
        logits = torch.where(allowed, logits, -math.inf)
    if scores.shape[1] == 0:
        return scores.sum()
    losses = torch.logsumexp(logits, 1) - logits.gather(1, column[:, None])[:, 0]
    return torch.where(rows, losses, 0.0).sum() / rows.sum().clamp(min=1)
