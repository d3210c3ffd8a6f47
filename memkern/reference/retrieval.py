"""Attention over retrieved pairs, fusion of sources by a gate, and the document-level span loss, in pure PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memkern.reference._common import compute_dtype, full_precision


def gather_bank(bank: Tensor, indices: Tensor) -> Tensor:
    """(B, A, M, d) rows at (B, A, T, C) int64 -> (B, A, T, C, d); the caller has made the indices valid."""
    batch, heads, queries, pairs = indices.shape
    flat = indices.reshape(batch, heads, queries * pairs, 1).expand(-1, -1, -1, bank.shape[-1])
    return bank.gather(2, flat).reshape(batch, heads, queries, pairs, bank.shape[-1])


def retrieved_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q . k_c) v_c over each query's own pairs; arguments as in :mod:`memkern.ops.retrieval`."""
    with full_precision(queries):
        dtype = compute_dtype(queries)
        q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
        present = mask
        if indices is not None:
            inside = (indices >= 0) & (indices < keys.shape[2])
            present = inside if mask is None else inside & mask
            if keys.shape[2] == 0:
                return (q * 0.0 + k.sum() + v.sum()).to(queries.dtype)
            safe = torch.where(present, indices, 0)
            k, v = gather_bank(k, safe), gather_bank(v, safe)
        if present is not None:
            # A pair that is masked must not reach the result, not even as 0 * NaN.
            k, v = (torch.where(present[..., None], x, 0.0) for x in (k, v))
        scores = (q[..., None, :] * k).sum(-1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if present is not None:
            some = present.any(-1, keepdim=True)
            scores = torch.where(present, scores, torch.where(some, -math.inf, 0.0))
        weights = torch.softmax(scores, -1)
        if present is not None:
            weights = torch.where(present, weights, 0.0)
        return (weights[..., None] * v).sum(-2).to(queries.dtype)


def fuse_sources(sources: Sequence[Tensor | None], gate_logits: Tensor) -> Tensor:
    """Softmax over the present sources only, weighted sum: (B, T, D) each, (B, T, n) -> (B, T, D)."""
    present = [i for i, source in enumerate(sources) if source is not None]
    chosen = [source for source in sources if source is not None]
    dtype = compute_dtype(chosen[0])
    gates = torch.softmax(torch.stack([gate_logits[..., i] for i in present], -1).to(dtype), -1)
    total = gates[..., 0, None] * chosen[0].to(dtype)
    for i, source in enumerate(chosen[1:], 1):
        total = total + gates[..., i, None] * source.to(dtype)
    return total.to(chosen[0].dtype)


def _masked_logsumexp(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp over the last axis where ``mask``, 0 with zero gradient for an empty row; and which rows are not."""
    some = mask.any(-1)
    kept = torch.where(mask, x, -math.inf)
    return torch.logsumexp(torch.where(some[..., None], kept, 0.0), -1) * some, some


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positive: Tensor,
    end_positive: Tensor,
    valid: Tensor,
    document: Tensor,
) -> Tensor:
    """Marginal softmax over a whole document's segments; arguments as in :mod:`memkern.ops.retrieval`."""
    segments = document.shape[0]
    if segments == 0:
        return (start_logits.sum() + end_logits.sum()).to(compute_dtype(start_logits))
    # Segment by segment first, then over the segments of each document: no sum depends on the order of an atomic.
    members = document == torch.arange(segments, device=document.device)[:, None]
    total, counted = None, None
    for logits, positive in ((start_logits, start_positive), (end_logits, end_positive)):
        x = torch.where(valid, logits.to(compute_dtype(logits)), 0.0)
        everything, any_valid = _masked_logsumexp(x, valid)
        answers, any_positive = _masked_logsumexp(x, valid & positive)
        norm, _ = _masked_logsumexp(everything.expand(segments, -1), members & any_valid)
        mass, has_answer = _masked_logsumexp(answers.expand(segments, -1), members & any_positive)
        loss = norm - mass
        total = loss if total is None else total + loss
        counted = has_answer if counted is None else counted & has_answer
    assert total is not None
    assert counted is not None
    return 0.5 * torch.where(counted, total, 0.0).sum() / counted.sum().clamp(min=1)
