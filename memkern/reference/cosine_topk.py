"""Exact top-k cosine search in pure PyTorch: what the compiled backends have to compute.

A score depends on its query and its row alone: products are rounded one by one and added in a fixed tree, both by
elementwise operations, so that neither the batch nor the block in which a pair is met can change a bit. With the row's
float32 inverse norm and the query's float64 one it is rounded once more. That makes a score of width D wrong by at most
(D + 2) 2^-24 of |q||x|, whatever the values are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memkern.reference._common import compute_dtype, full_precision

PRODUCTS = 1 << 20
"""Products held at once while rows are scored: what bounds the memory, whatever Q and N are."""
ROWS_PER_SORT = 8192
QUERIES_PER_PASS = 32


class TopK(NamedTuple):
    """What :func:`cosine_topk` returns."""

    scores: Tensor
    """(Q, k) float32, descending; -inf where there are fewer than k candidates."""
    indices: Tensor
    """(Q, k) int64; -1 where there are fewer than k candidates."""


def ordered_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b`` over the last axis: rounded products, the halves of the axis added until one value is left."""
    terms = a * b
    width = terms.shape[-1]
    if width == 0:
        return terms.sum(-1)
    while width > 1:
        half = width // 2
        folded = terms[..., :half] + terms[..., width - half :]
        # An odd width keeps its middle term for the next round.
        terms = torch.cat((folded, terms[..., half : half + 1]), -1) if width % 2 else folded
        width -= half
    return terms[..., 0]


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last axis in float64, 0 with zero gradient for a zero vector."""
    wide = x.double()
    squared = ordered_dot(wide, wide)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).rsqrt())


def _rounded(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    # The inverse of a subnormal norm would overflow float32, and infinity times a zero product is NaN.
    return inverse.clamp(max=torch.finfo(dtype).max).to(dtype)


def inverse_norms(database: Tensor) -> Tensor:
    """(..., N, D) -> (..., N) float32: 1 / |x| of each row, 0 for a zero row."""
    return _rounded(_inverse_norm(database), compute_dtype(database))


def _scaled(queries: Tensor) -> Tensor:
    """Queries times a power of two each, which changes no digit of a product but keeps it away from overflow."""
    if queries.shape[-1] == 0:
        return queries
    largest = queries.detach().abs().amax(-1, keepdim=True)
    mantissa = torch.frexp(largest).mantissa
    usable = torch.isfinite(largest) & (largest >= torch.finfo(queries.dtype).tiny)
    return queries * torch.where(usable, mantissa / torch.where(usable, largest, 1.0), 1.0)


def _scores(queries: Tensor, rows: Tensor, row_inverse: Tensor | None) -> Tensor:
    """Scores of broadcastable (..., D) queries and rows; ``row_inverse`` None is the plain inner product."""
    if row_inverse is None:
        return ordered_dot(queries, rows)
    scaled = _scaled(queries)
    cosine = ordered_dot(scaled, rows).double() * row_inverse.double() * _inverse_norm(scaled)
    # Adding zero turns -0 into 0.
    return cosine.to(queries.dtype) + 0.0


def _block_scores(queries: Tensor, rows: Tensor, row_inverse: Tensor | None) -> Tensor:
    """(G, Q, D) and (G, n, D) -> (G, Q, n), never more than ``PRODUCTS`` products at a time."""
    step = max(1, PRODUCTS // max(1, queries.numel()))
    parts = []
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        inverse = None if row_inverse is None else row_inverse[:, None, part]
        parts.append(_scores(queries[:, :, None], rows[:, None, part], inverse))
    return torch.cat(parts, -1)


def _candidates(
    start: int,
    stop: int,
    valid: Tensor | None,
    query_group: Tensor | None,
    row_group: Tensor | None,
) -> Tensor | None:
    """Which of the rows in [start, stop) each query may find, broadcastable to (G, Q, stop - start); None for all."""
    allowed = None
    if valid is not None:
        allowed = (valid if valid.dim() == 3 else valid[:, None])[..., start:stop]
    if query_group is not None and row_group is not None:
        same = query_group[..., None] == row_group[:, None, start:stop]
        allowed = same if allowed is None else allowed & same
    return allowed


def _search(
    queries: Tensor,
    database: Tensor,
    k: int,
    valid: Tensor | None,
    query_group: Tensor | None,
    row_group: Tensor | None,
    row_inverse: Tensor | None,
    normalized: bool,
    min_score: float | None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of each of (G, Q, D) queries: scores and indices, -inf and -1 in the tail."""
    dtype = compute_dtype(queries, database)
    found = queries.shape[:2]
    scores = torch.full((*found, k), -math.inf, dtype=dtype, device=queries.device)
    keys, indices = scores, torch.full((*found, k), -1, dtype=torch.int64, device=queries.device)
    for start in range(0, database.shape[1], ROWS_PER_SORT):
        rows = database[:, start : start + ROWS_PER_SORT].to(dtype)
        stop = start + rows.shape[1]
        if normalized:
            inverse = None
        else:
            inverse = inverse_norms(rows) if row_inverse is None else row_inverse[:, start:stop]
        block = _block_scores(queries.to(dtype), rows, inverse)
        wins = ~block.isnan()
        if min_score is not None:
            wins = wins & (block >= torch.full((), min_score, dtype=dtype, device=block.device))
        allowed = _candidates(start, stop, valid, query_group, row_group)
        if allowed is not None:
            wins = wins & allowed
        # The key of a candidate stays above that of an empty place, even when its score is -inf.
        block_keys = torch.where(wins, block.clamp(min=torch.finfo(dtype).min), -math.inf)
        positions = torch.arange(start, stop, device=queries.device).expand(*found, -1)
        keys = torch.cat((keys, block_keys), -1)
        # What was found before has the lower indices and stands in front, so a stable sort breaks ties by index.
        order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        keys = keys.gather(-1, order)
        empty = keys == -math.inf
        scores = torch.where(empty, -math.inf, torch.cat((scores, block), -1).gather(-1, order))
        indices = torch.where(empty, -1, torch.cat((indices, positions), -1).gather(-1, order))
    return scores, indices


def _with_gradient_of(value: Tensor, source: Tensor, scale: Tensor | None = None) -> Tensor:
    """``value``, exactly, with the gradient of ``source`` (times ``scale``) in place of its own."""
    zero = torch.nan_to_num(source - source.detach(), nan=0.0)
    return value.detach() + (zero if scale is None else scale * zero)


def score_rows(
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    *,
    inverse_norms: Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    """Scores of chosen rows, differentiable any number of times in the queries and the rows.

    Args:
        queries: (G, Q, D).
        database: (G, N, D).
        indices: (G, Q, k) int64; -1 gives -inf and no gradient.
        inverse_norms: (G, N); used as they are, while the gradient of the rows is that of the true cosine.
        normalized: the plain inner product.

    Returns:
        (G, Q, k) in float32, float64 for float64: bit for bit what the search compares.
    """
    dtype = compute_dtype(queries, database)
    found = indices >= 0
    if database.shape[1] == 0:
        # No row to gather; both keep a (zero) gradient.
        unused = torch.where(found, queries.to(dtype).sum(-1, keepdim=True) + database.to(dtype).sum(), 0.0)
        return torch.where(found, unused, -math.inf)
    group = torch.arange(indices.shape[0], device=indices.device)[:, None, None]
    place = indices.clamp(min=0)
    # Gathered in the computing dtype, so that several gradients of one row add up before they are rounded.
    source = database.to(dtype) if torch.is_grad_enabled() else database
    rows = torch.where(found[..., None], source[group, place].to(dtype), 0.0)
    # A query that found nothing, such as one with NaN, gets no gradient.
    wide = torch.where(found.any(-1, keepdim=True), queries.to(dtype), 0.0)[:, :, None]
    if normalized:
        inverse = None
    else:
        own = _inverse_norm(rows)
        inverse = _rounded(own, dtype)
        if inverse_norms is not None:
            given = torch.where(found, inverse_norms.detach()[group, place], 0.0).to(dtype)
            ratio = torch.where(given == 0, 1.0, own.detach().to(dtype) / given)
            rows = _with_gradient_of(rows, rows, ratio[..., None])
            inverse = _with_gradient_of(given, inverse)
    return torch.where(found, _scores(wide, rows, inverse), -math.inf)


def cosine_topk(
    queries: Tensor,
    database: Tensor,
    k: int,
    *,
    valid: Tensor | None = None,
    query_group: Tensor | None = None,
    row_group: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    normalized: bool = False,
    min_score: float | None = None,
) -> TopK:
    """The k best rows of each query; arguments as :func:`memkern.ops.cosine_topk.cosine_topk`."""
    if queries.dim() == 2:
        alone = cosine_topk(
            queries[None],
            database[None],
            k,
            valid=None if valid is None else valid[None],
            query_group=None if query_group is None else query_group[None],
            row_group=None if row_group is None else row_group[None],
            inverse_norms=None if inverse_norms is None else inverse_norms[None],
            normalized=normalized,
            min_score=min_score,
        )
        return TopK(alone.scores[0], alone.indices[0])
    with full_precision(queries):
        parts = []
        with torch.no_grad():
            for start in range(0, queries.shape[1], QUERIES_PER_PASS):
                part = slice(start, start + QUERIES_PER_PASS)
                parts.append(
                    _search(
                        queries[:, part],
                        database,
                        k,
                        valid[:, part] if valid is not None and valid.dim() == 3 else valid,
                        None if query_group is None else query_group[:, part],
                        row_group,
                        inverse_norms,
                        normalized,
                        min_score,
                    )[1]
                )
            empty = torch.empty((queries.shape[0], 0, k), dtype=torch.int64, device=queries.device)
            indices = torch.cat((empty, *parts), 1)
        scores = score_rows(queries, database, indices, inverse_norms=inverse_norms, normalized=normalized)
        return TopK(scores, indices)
