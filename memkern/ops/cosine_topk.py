"""Exact top-k cosine search over a database of rows, with gradients to the queries and to the rows it selects.

Raw operators, each ``memkern::<name>_<backend>`` for cpp, triton and cuda, always with a leading axis G of searches
side by side, f = float32 (float64 for float64):

- ``cosine_topk_fwd`` returns scores (G, Q, k) f and indices (G, Q, k) int64; ``min_score`` -inf keeps everything. No
  backend ever holds Q x N scores: rows are scored block by block against a bound that only rises.
- ``cosine_topk_bwd`` reads the selected rows again and adds the gradients of a row that several queries selected in the
  order (query, rank), in f, rounding once.
- ``inverse_norms_fwd``, ``inverse_norms_bwd``: 1 / |x| of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memkern import backends, native
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._collectives import gather_ranks
from memkern.ops._cpu_gemm import search_library_from
from memkern.ops._library import define, needs_reference
from memkern.reference import cosine_topk as reference
from memkern.reference._common import compute_dtype
from memkern.reference.cosine_topk import TopK

__all__ = ["TopK", "cosine_topk", "inverse_norms"]

MAX_K = 2048
_NO_BOUND = float("-inf")


def _fwd_fake(
    queries: Tensor,
    database: Tensor,
    k: int,
    valid: Tensor | None,
    query_group: Tensor | None,
    row_group: Tensor | None,
    inverse_norms: Tensor | None,
    normalized: bool,
    min_score: float,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], queries.shape[1], k)
    return (
        queries.new_empty(shape, dtype=compute_dtype(queries)),
        queries.new_empty(shape, dtype=torch.int64),
    )


def _bwd_fake(
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    inverse_norms: Tensor | None,
    normalized: bool,
    need_queries: bool,
    need_database: bool,
) -> tuple[Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape if need_queries else (0,)),
        database.new_empty(database.shape if need_database else (0,)),
    )


_FWD = define(
    "cosine_topk_fwd",
    "(Tensor queries, Tensor database, int k, Tensor? valid, Tensor? query_group, Tensor? row_group, "
    "Tensor? inverse_norms, bool normalized, float min_score) -> (Tensor scores, Tensor indices)",
    _fwd_fake,
)
_BWD = define(
    "cosine_topk_bwd",
    "(Tensor grad, Tensor queries, Tensor database, Tensor indices, Tensor? inverse_norms, bool normalized, "
    "bool need_queries, bool need_database) -> (Tensor d_queries, Tensor d_database)",
    _bwd_fake,
)
_NORMS_FWD = define(
    "inverse_norms_fwd",
    "(Tensor database) -> Tensor",
    lambda database: database.new_empty(database.shape[:2], dtype=compute_dtype(database)),
    column="cosine_topk",
)
_NORMS_BWD = define(
    "inverse_norms_bwd",
    "(Tensor grad, Tensor database) -> Tensor",
    lambda grad, database: database.new_empty(database.shape),
    column="cosine_topk",
)


def _row_limit(queries: Tensor, database: Tensor | None = None, *_: Tensor | None) -> str | None:
    """The GPU kernels keep a row's number in 32 bits while they compare; indices are int64."""
    rows = queries.shape[-2] if database is None else database.shape[-2]
    return None if rows < 1 << 31 else f"takes fewer than 2^31 rows, not {rows}; search parts and merge them"


for _op in ("cosine_topk", "inverse_norms"):
    backends.declare(
        _op,
        cpp=backends.ALL,
        triton=backends.LOW,
        cuda=backends.LOW,
        limits={"triton": _row_limit, "cuda": _row_limit},
    )


_LIBRARY_FROM = search_library_from()
if native.LIBRARIES["cpu"].loaded and _LIBRARY_FROM is not None:
    torch.ops.memkern.search_library_from(_LIBRARY_FROM)


class _CosineTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        queries: Tensor,
        database: Tensor,
        k: int,
        valid: Tensor | None,
        query_group: Tensor | None,
        row_group: Tensor | None,
        norms: Tensor | None,
        normalized: bool,
        min_score: float,
    ) -> tuple[Tensor, Tensor]:
        scores, indices = _FWD[backend](
            queries, database, k, valid, query_group, row_group, norms, normalized, min_score
        )
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(queries, database, indices, norms)
        ctx.backend, ctx.normalized = backend, normalized
        return scores, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, database, indices, norms = ctx.saved_tensors
        _, need_queries, need_database, *_ = ctx.needs_input_grad
        nothing = (None,) * 7
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            scores = reference.score_rows(queries, database, indices, inverse_norms=norms, normalized=ctx.normalized)
            wanted = ((queries, need_queries), (database, need_database))
            return (None, *differentiable_backward([scores], [grad], wanted), *nothing)
        d_queries, d_database = _BWD[ctx.backend](
            grad, queries, database, indices, norms, ctx.normalized, need_queries, need_database
        )
        return (None, d_queries if need_queries else None, d_database if need_database else None, *nothing)


class _InverseNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, database: Tensor) -> Tensor:
        ctx.save_for_backward(database)
        ctx.backend = backend
        return _NORMS_FWD[backend](database)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (database,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *differentiable_backward([reference.inverse_norms(database)], [grad], [(database, True)])
        return None, _NORMS_BWD[ctx.backend](grad, database)


def _check_search(
    queries: Any,
    database: Any,
    k: Any,
    valid: Any,
    query_group: Any,
    row_group: Any,
    norms: Any,
    normalized: Any,
    min_score: Any,
    process_group: Any,
) -> None:
    _checks.tensor("queries", queries)
    searches: tuple[int | str, ...] = ()
    if queries.dim() == 3:
        _checks.floating("queries", queries, ("G", "Q", "D"))
        searches = (queries.shape[0],)
    else:
        _checks.floating("queries", queries, ("Q", "D"))
    count, width = queries.shape[-2], queries.shape[-1]
    _checks.floating("database", database, (*searches, "N", width), queries, "queries")
    rows = database.shape[-2]
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        _checks.fail_type("k", "an int", k)
    if not 1 <= k <= MAX_K:
        _checks.fail("k", f"1 <= k <= {MAX_K}", k)
    if valid is not None:
        per_query = isinstance(valid, Tensor) and valid.dim() == len(searches) + 2
        shape = (*searches, count, rows) if per_query else (*searches, rows)
        _checks.mask("valid", valid, shape, queries, "queries")
    if (query_group is None) != (row_group is None):
        missing = "query_group" if query_group is None else "row_group"
        _checks.fail(missing, "both query_group and row_group, or neither", None)
    if query_group is not None:
        _checks.integer("query_group", query_group, (*searches, count), queries, "queries")
        _checks.integer("row_group", row_group, (*searches, rows), queries, "queries")
    if not isinstance(normalized, bool):
        _checks.fail_type("normalized", "a bool", normalized)
    if norms is not None:
        _checks.floating("inverse_norms", norms, (*searches, rows), queries, "queries")
        if normalized:
            _checks.fail("inverse_norms", "None with normalized=True, which divides by no norm", norms)
    if min_score is not None:
        if isinstance(min_score, bool) or not isinstance(min_score, int | float | torch.SymFloat):
            _checks.fail_type("min_score", "a float or None", min_score)
        if min_score != min_score:
            _checks.fail("min_score", "a number", min_score)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        _checks.fail_type("process_group", "a torch.distributed.ProcessGroup or None", process_group)


def _check_values(
    queries: Tensor,
    database: Tensor,
    valid: Tensor | None,
    query_group: Tensor | None,
    row_group: Tensor | None,
    norms: Tensor | None,
) -> None:
    """Under MEMKERN_CHECK=1: no NaN, rows apart that are a candidate of no query."""
    candidates = valid if valid is None or valid.dim() == database.dim() - 1 else valid.any(-2)
    if query_group is not None and row_group is not None:
        searches = zip(*(ids.reshape(-1, ids.shape[-1]).unbind() for ids in (row_group, query_group)), strict=True)
        wanted = [torch.isin(rows, asked) for rows, asked in searches]
        same = torch.stack(wanted).reshape(row_group.shape) if wanted else row_group == 0
        candidates = same if candidates is None else candidates & same
    _checks.no_nan("queries", queries)
    _checks.no_nan("database", database, None if candidates is None else candidates[..., None])
    _checks.in_range("inverse_norms", norms, 0.0, torch.finfo(torch.float32).max)


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
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TopK:
    """The k rows of ``database`` of the highest cosine to each query, exactly, by (score descending, index ascending).

    ``score = q . x / (|q| |x|)``, where the dot product is one float32 sum in a fixed order: the bits of a score depend
    on its query and its row alone, not on how queries are batched. Faster passes only pre-select. A zero row or query
    scores 0; a row whose score is NaN never wins. Memory beside the results is O(Q k), never Q x N, and ``database`` is
    neither copied nor normalised.

    Args:
        queries: (Q, D) float, or (G, Q, D) with a database (G, N, D): G searches side by side. Any strides.
        database: (N, D) or (G, N, D), float32, bfloat16 or float16 (float64 with float64 queries).
        k: 1 <= k <= 2048.
        valid: (N,) or (Q, N) bool, with G (G, N) or (G, Q, N): rows that may be found (by each query).
        query_group: (Q,) or (G, Q) int64, together with ``row_group``: a row is found only by queries of its group.
        row_group: (N,) or (G, N) int64.
        inverse_norms: (N,) or (G, N) float32 from :func:`inverse_norms`, used as they are; no gradient.
        normalized: the rows and queries are of unit length: score = q . x.
        min_score: rows that score less are not found (an equal score is).
        process_group: ``database`` is this rank's block of rows, ``queries`` the same on every rank. Every rank gets
            the result over all blocks, with indices that count through the ranks in order; its gradients carry the
            factor world size, so that DDP's mean over ranks equals one process. ``valid``, ``row_group`` and
            ``inverse_norms`` are those of the local block.
        backend: see :mod:`memkern.backends`.

    Returns:
        TopK: ``scores`` (Q, k) float32 (float64 for float64), descending, ``indices`` (Q, k) int64; with a leading G
        where the arguments have it. Where a query has fewer than k candidates, -inf and -1. Gradients flow from the
        scores to the queries and to the selected rows; those of a row are summed in a fixed order.

    Raises:
        ValueError: wrong rank, size, dtype, device or value; the message names the argument.
        TypeError: an argument of the wrong type, a mask that is not bool, or a DTensor.
        BackendUnavailable: the explicit backend cannot take the call.
    """
    _check_search(
        queries,
        database,
        k,
        valid,
        query_group,
        row_group,
        inverse_norms,
        normalized,
        min_score,
        process_group,
    )
    if _checks.values_enabled():
        _check_values(queries, database, valid, query_group, row_group, inverse_norms)
    chosen = backends.select("cosine_topk", backend, queries, database, inverse_norms)
    if queries.dim() == 2:
        found = _search(
            chosen,
            queries[None],
            database[None],
            k,
            None if valid is None else valid[None],
            None if query_group is None else query_group[None],
            None if row_group is None else row_group[None],
            None if inverse_norms is None else inverse_norms[None],
            normalized,
            min_score,
            process_group,
        )
        return TopK(found.scores[0], found.indices[0])
    return _search(
        chosen,
        queries,
        database,
        k,
        valid,
        query_group,
        row_group,
        inverse_norms,
        normalized,
        min_score,
        process_group,
    )


def _search(
    backend: str,
    queries: Tensor,
    database: Tensor,
    k: int,
    valid: Tensor | None,
    query_group: Tensor | None,
    row_group: Tensor | None,
    norms: Tensor | None,
    normalized: bool,
    min_score: float | None,
    process_group: ProcessGroup | None,
) -> TopK:
    """:func:`cosine_topk` of checked arguments with a leading G."""
    if backend == "reference" or needs_reference():
        found = reference.cosine_topk(
            queries,
            database,
            k,
            valid=valid,
            query_group=query_group,
            row_group=row_group,
            inverse_norms=norms,
            normalized=normalized,
            min_score=min_score,
        )
    else:
        bound = _NO_BOUND if min_score is None else float(min_score)
        if norms is not None:
            norms = norms.detach().to(compute_dtype(queries))
        if gradient_needed(queries, database):
            scores, indices = _CosineTopK.apply(
                backend, queries, database, k, valid, query_group, row_group, norms, normalized, bound
            )
        else:
            scores, indices = _FWD[backend](
                queries, database, k, valid, query_group, row_group, norms, normalized, bound
            )
        found = TopK(scores, indices)
    return found if process_group is None else _merge_ranks(found, database.shape[1], process_group)


def _merge_ranks(local: TopK, rows: int, group: ProcessGroup) -> TopK:
    """The k best of all ranks' (G, Q, k) results; a rank's ``rows`` follow those of the ranks before it."""
    k = local.scores.shape[-1]
    counts = gather_ranks(torch.full((), rows, dtype=torch.int64, device=local.indices.device), group)
    first = (counts.cumsum(0) - counts)[:, None, None, None]
    indices = gather_ranks(local.indices, group)
    indices = torch.where(indices >= 0, indices + first, -1)
    # (ranks, G, Q, k) -> (G, Q, ranks k): in this order equal scores already stand by ascending index.
    scores = gather_ranks(local.scores, group).movedim(0, 2).flatten(2)
    indices = indices.movedim(0, 2).flatten(2)
    # The key of a candidate stays above that of an empty place, even when its score is -inf.
    least = torch.finfo(scores.dtype).min
    keys = torch.where(indices >= 0, scores.detach().clamp(min=least), _NO_BOUND)
    order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return TopK(scores.gather(-1, order), indices.gather(-1, order))


def inverse_norms(database: Tensor, *, backend: str | None = None) -> Tensor:
    """1 / |x| of each row, for ``cosine_topk(..., inverse_norms=)``: computed once for a database that stays.

    Args:
        database: (N, D) or (G, N, D) float, any strides.
        backend: see :mod:`memkern.backends`.

    Returns:
        (N,) or (G, N) float32 (float64 for float64), 0 for a zero row; differentiable, with gradient 0 there.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    _checks.tensor("database", database)
    _checks.floating("database", database, ("G", "N", "D") if database.dim() == 3 else ("N", "D"))
    if _checks.values_enabled():
        _checks.no_nan("database", database)
    chosen = backends.select("inverse_norms", backend, database)
    if chosen == "reference" or needs_reference():
        return reference.inverse_norms(database)
    wide = database if database.dim() == 3 else database[None]
    norms = _InverseNorms.apply(chosen, wide) if gradient_needed(wide) else _NORMS_FWD[chosen](wide)
    return norms if database.dim() == 3 else norms[0]


# In ``memkern.ops`` the name stands for the function, as those of the other operators do, and hides this module: what
# is looked up on it as on a module is found here.
cosine_topk.__dict__.update(TopK=TopK, cosine_topk=cosine_topk, inverse_norms=inverse_norms)
