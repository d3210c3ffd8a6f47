"""Holds the results of a search to a float64 brute force."""

from __future__ import annotations

import torch

from memkern.ops.cosine_topk import TopK

INF = float("inf")


def true_scores(queries: torch.Tensor, database: torch.Tensor, normalized: bool = False) -> torch.Tensor:
    """(Q, N) in float64; NaN where the row or the query is not finite."""
    q, x = queries.double(), database.double()
    if normalized:
        return q @ x.T
    largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # Scaled first: the square of 1e-200 is zero in float64 too.
    x = x / largest
    q = q / q.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    norms = q.norm(dim=-1)[:, None] * x.norm(dim=-1)
    return torch.where(norms == 0, 0.0, q @ x.T / torch.where(norms == 0, 1.0, norms))


def assert_exact(found: TopK, truth: torch.Tensor, k: int, width: int, scale: torch.Tensor | float = 1.0) -> None:
    """A result is exact as far as its dtype goes, and sorted by its own scores.

    Args:
        truth: (Q, N) float64, NaN where a row is no candidate.
        width: D, the terms of a score.
        scale: |q||x|, 1 for cosines.
    """
    scores, indices = found.scores.cpu(), found.indices.cpu()
    truth = truth.cpu()
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu().expand_as(truth)
    assert scores.shape == indices.shape == (truth.shape[0], k)
    assert indices.dtype == torch.int64
    u = 2.0**-53 if scores.dtype == torch.float64 else 2.0**-24
    for row in range(truth.shape[0]):
        candidate = ~truth[row].isnan()
        count = min(k, int(candidate.sum()))
        own, at = scores[row, :count].double(), indices[row, :count]
        assert bool((scores[row, count:] == -INF).all())
        assert bool((indices[row, count:] == -1).all())
        assert bool(((at >= 0) & (at < truth.shape[1])).all())
        assert bool(candidate[at].all()), "a row that is no candidate was found"
        assert at.unique().numel() == count, "a row was found twice"
        falls, level = own[1:] < own[:-1], own[1:] == own[:-1]
        assert bool((falls | (level & (at[1:] > at[:-1]))).all()), "not by (score descending, index ascending)"
        bound = (width + 2) * u * scale[row]
        assert bool(((own - truth[row, at]).abs() <= bound[at] + 1e-300).all()), "a score is wrong"
        left = candidate.clone()
        left[at] = False
        if count and bool(left.any()):
            worst = truth[row, at].min()
            wrong = (truth[row] - worst > 2 * bound + 1e-300) & left
            assert not bool(wrong.any()), f"query {row}: {int(wrong.sum())} rows left out beat an included one"


def same(a: TopK, b: TopK) -> bool:
    """The same bits."""
    return torch.equal(a.scores, b.scores) and torch.equal(a.indices, b.indices)
