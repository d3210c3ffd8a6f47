"""Losses that our language models share."""

from __future__ import annotations

from torch import Tensor, nn


def shifted_cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy of (B, T, V) logits with the next token's label; -100 is ignored, no label at all gives 0.

    Args:
        logits: (B, T, V) float.
        labels: (B, T) int64.
        num_items_in_batch: labels in all accumulated micro-batches: the sum is divided by it instead.
    """
    return cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)


def cross_entropy(logits: Tensor, targets: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """:func:`shifted_cross_entropy` of targets that stand where they are predicted."""
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (targets != -100).sum().clamp(min=1)
