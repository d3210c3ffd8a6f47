"""Retrieval: attention of each query over its own retrieved pairs, gated fusion of sources, document-level span loss.

Raw operators, each ``memkern::<name>_<backend>`` for cpp, triton and cuda, f = float32 (float64 for float64):

- ``retrieved_attention_fwd`` -> (out (B, A, T, d), lse (B, A, T) f). ``keys``/``values`` are (B, A, T, C, d), or the
  bank (B, A, M, d) when ``indices`` (B, A, T, C) int64 is given. lse is log sum exp of the scaled scores, -inf for a
  row without a pair.
- ``retrieved_attention_bwd`` recomputes the weights from lse; gradients of own pairs are written once each, those of a
  bank are summed in the order of (t, c).
- ``fuse_sources_fwd``/``_bwd`` take the present sources and the column of ``gate_logits`` of each.
- ``span_loss_fwd`` -> (loss () f, stats (4, N) f: by document the log mass of all and of the positive positions, start
  and then end, all +inf for one that does not count); ``span_loss_bwd`` needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkern import backends
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._library import accumulator, define, needs_reference
from memkern.reference import retrieval as reference

__all__ = ["fuse_sources", "retrieved_attention", "span_loss"]

MAX_SOURCES = 16


_ATTENTION_FWD = define(
    "retrieved_attention_fwd",
    "(Tensor queries, Tensor keys, Tensor values, Tensor? indices, Tensor? mask, float scale) -> "
    "(Tensor out, Tensor lse)",
    lambda queries, keys, values, indices, mask, scale: (
        queries.new_empty(queries.shape),
        queries.new_empty(queries.shape[:3], dtype=accumulator(queries)),
    ),
    column="retrieval",
)
_ATTENTION_BWD = define(
    "retrieved_attention_bwd",
    "(Tensor grad, Tensor queries, Tensor keys, Tensor values, Tensor? indices, Tensor? mask, Tensor out, Tensor lse, "
    "float scale, bool need_queries, bool need_pairs) -> (Tensor d_queries, Tensor d_keys, Tensor d_values)",
    lambda grad, queries, keys, values, indices, mask, out, lse, scale, need_queries, need_pairs: (
        queries.new_empty(queries.shape if need_queries else (0,)),
        keys.new_empty(keys.shape if need_pairs else (0,)),
        values.new_empty(values.shape if need_pairs else (0,)),
    ),
    column="retrieval",
)
_FUSE_FWD = define(
    "fuse_sources_fwd",
    "(Tensor[] sources, Tensor gate_logits, int[] columns) -> Tensor",
    lambda sources, gate_logits, columns: sources[0].new_empty(sources[0].shape),
    column="retrieval",
)
_FUSE_BWD = define(
    "fuse_sources_bwd",
    "(Tensor grad, Tensor[] sources, Tensor gate_logits, int[] columns) -> (Tensor[] d_sources, Tensor d_gate_logits)",
    lambda grad, sources, gate_logits, columns: (
        [source.new_empty(source.shape) for source in sources],
        gate_logits.new_empty(gate_logits.shape),
    ),
    column="retrieval",
)
_SPAN_FWD = define(
    "span_loss_fwd",
    "(Tensor start_logits, Tensor end_logits, Tensor start_positive, Tensor end_positive, Tensor valid, "
    "Tensor document) -> (Tensor loss, Tensor stats)",
    lambda start_logits, end_logits, start_positive, end_positive, valid, document: (
        start_logits.new_empty((), dtype=accumulator(start_logits)),
        start_logits.new_empty((4, document.shape[0]), dtype=accumulator(start_logits)),
    ),
    column="retrieval",
)
_SPAN_BWD = define(
    "span_loss_bwd",
    "(Tensor grad, Tensor start_logits, Tensor end_logits, Tensor start_positive, Tensor end_positive, Tensor valid, "
    "Tensor document, Tensor stats) -> (Tensor d_start_logits, Tensor d_end_logits)",
    lambda grad, start_logits, end_logits, start_positive, end_positive, valid, document, stats: (
        start_logits.new_empty(start_logits.shape),
        end_logits.new_empty(end_logits.shape),
    ),
    column="retrieval",
)


def _cuda_width(*tensors: Tensor | None) -> str | None:
    """The CUDA kernels hold a row of a head in the registers of one warp."""
    given = [tensor for tensor in tensors if tensor is not None]
    width = given[0].shape[-1]
    pack = 4 if any(tensor.dtype != torch.bfloat16 and tensor.dtype != torch.float16 for tensor in given) else 8
    most = 512 if width % pack == 0 else 256
    if width <= most:
        return None
    return f"cuda takes heads of at most 512 elements, 256 where they are no multiple of 16 bytes; this one has {width}"


backends.declare(
    "retrieved_attention",
    cpp=backends.ALL,
    triton=backends.LOW,
    cuda=backends.LOW,
    limits={"cuda": _cuda_width},
)
for _op in ("fuse_sources", "span_loss"):
    backends.declare(_op, cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)


class _RetrievedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        indices: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        out, lse = _ATTENTION_FWD[backend](queries, keys, values, indices, mask, scale)
        ctx.save_for_backward(queries, keys, values, indices, mask, out, lse)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, indices, mask, out, lse = ctx.saved_tensors
        _, need_q, need_k, need_v, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            output = reference.retrieved_attention(queries, keys, values, indices=indices, mask=mask, scale=ctx.scale)
            wanted = ((queries, need_q), (keys, need_k), (values, need_v))
            return None, *differentiable_backward([output], [grad], wanted), None, None, None
        d_queries, d_keys, d_values = _ATTENTION_BWD[ctx.backend](
            grad, queries, keys, values, indices, mask, out, lse, ctx.scale, need_q, need_k or need_v
        )
        return (
            None,
            d_queries if need_q else None,
            d_keys if need_k else None,
            d_values if need_v else None,
            None,
            None,
            None,
        )


def _check_pairs(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor | None, mask: Tensor | None) -> None:
    """Under MEMKERN_CHECK=1: no NaN in a pair that some query takes, and in a query that takes one."""
    taken = mask
    if indices is not None:
        size = keys.shape[2]
        inside = (indices >= 0) & (indices < size)
        taken = inside if mask is None else inside & mask
        rows = torch.where(taken, indices, size).flatten(2)
        wanted = torch.zeros((*keys.shape[:2], size + 1), dtype=torch.bool, device=keys.device)
        included: Tensor | None = wanted.scatter_(2, rows, True)[..., :size, None]
    else:
        included = None if mask is None else mask[..., None]
    _checks.no_nan("queries", queries, None if taken is None else taken.any(-1, keepdim=True))
    _checks.no_nan("keys", keys, included)
    _checks.no_nan("values", values, included)


def retrieved_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each query over the C pairs that were retrieved for it: softmax_c(scale q . k_c) v_c.

    Args:
        queries: (B, A, T, d) float, A heads.
        keys, values: (B, A, T, C, d) float, each query's own pairs; with ``indices`` a bank (B, A, M, d).
        indices: (B, A, T, C) int64 rows of the bank, so that the (B, A, T, C, d) pairs are never made. A negative
            index, or one that is not below M, is no pair; an index that occurs twice counts twice.
        mask: (B, A, T, C) bool, True for pairs that take part.
        scale: factor of the scores, 1/sqrt(d) by default.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, A, T, d) in the dtype of ``queries``; zeros for a query without a pair.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    _checks.floating("queries", queries, ("B", "A", "T", "d"))
    batch, heads, count, width = queries.shape
    if indices is None:
        _checks.floating("keys", keys, (batch, heads, count, "C", width), queries, "queries")
        pairs = keys.shape[3]
    else:
        _checks.floating("keys", keys, (batch, heads, "M", width), queries, "queries")
        _checks.integer("indices", indices, (batch, heads, count, "C"), queries, "queries")
        pairs = indices.shape[3]
    _checks.floating("values", values, tuple(keys.shape), queries, "queries")
    if mask is not None:
        _checks.mask("mask", mask, (batch, heads, count, pairs), queries, "queries")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        _checks.fail_type("scale", "a float or None", scale)
    if scale is not None and not math.isfinite(scale):
        _checks.fail("scale", "a finite number", scale)
    if _checks.values_enabled():
        _check_pairs(queries, keys, values, indices, mask)
    factor = (1 / math.sqrt(width) if width else 1.0) if scale is None else float(scale)
    chosen = backends.select("retrieved_attention", backend, queries, keys, values)
    if chosen == "reference" or needs_reference():
        return reference.retrieved_attention(queries, keys, values, indices=indices, mask=mask, scale=factor)
    if gradient_needed(queries, keys, values):
        if values is keys and torch.compiler.is_compiling():
            values = keys.view_as(keys)  # Dynamo traces no autograd.Function that gets one tensor twice
        return _RetrievedAttention.apply(chosen, queries, keys, values, indices, mask, factor)
    return _ATTENTION_FWD[chosen](queries, keys, values, indices, mask, factor)[0]


class _FuseSources(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, columns: list[int], gate_logits: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(gate_logits, *sources)
        ctx.backend, ctx.columns = backend, columns
        return _FUSE_FWD[backend](list(sources), gate_logits, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate_logits, *sources = ctx.saved_tensors
        _, _, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            spread: list[Tensor | None] = [None] * gate_logits.shape[-1]
            for column, source in zip(ctx.columns, sources, strict=True):
                spread[column] = source
            output = reference.fuse_sources(spread, gate_logits)
            wanted = list(zip((gate_logits, *sources), needs, strict=True))
            return None, None, *differentiable_backward([output], [grad], wanted)
        d_sources, d_gate = _FUSE_BWD[ctx.backend](grad, sources, gate_logits, ctx.columns)
        return None, None, *(g if need else None for g, need in zip((d_gate, *d_sources), needs, strict=True))


def fuse_sources(sources: Sequence[Tensor | None], gate_logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Mix sources by a softmax over the present ones: sum_i gate_i source_i.

    Args:
        sources: up to 16 (B, T, D) float tensors, None for a source that is absent.
        gate_logits: (B, T, number of sources) float; the columns of absent sources take no mass.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, T, D) in the dtype of the first present source.

    Raises:
        ValueError: no source is present, or a bad argument, named. TypeError: an argument of the wrong type.
    """
    if isinstance(sources, Tensor) or not isinstance(sources, Sequence):
        _checks.fail_type("sources", "a sequence of tensors and None", sources)
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"sources: expected at most {MAX_SOURCES}, got {len(sources)}")
    columns = [i for i, source in enumerate(sources) if source is not None]
    if not columns:
        raise ValueError(f"sources: expected at least one that is present, got {len(sources)} of None")
    present = [source for source in sources if source is not None]
    first, name = present[0], f"sources[{columns[0]}]"
    _checks.floating(name, first, ("B", "T", "D"))
    for i, source in zip(columns[1:], present[1:], strict=True):
        _checks.floating(f"sources[{i}]", source, tuple(first.shape), first, name)
    _checks.floating("gate_logits", gate_logits, (first.shape[0], first.shape[1], len(sources)), first, name)
    if _checks.values_enabled():
        _checks.no_nan("gate_logits", gate_logits[..., columns])
        for i, source in zip(columns, present, strict=True):
            _checks.no_nan(f"sources[{i}]", source)
    chosen = backends.select("fuse_sources", backend, *present, gate_logits)
    if chosen == "reference" or needs_reference():
        return reference.fuse_sources(sources, gate_logits)
    if gradient_needed(gate_logits, *present):
        return _FuseSources.apply(chosen, columns, gate_logits, *present)
    return _FUSE_FWD[chosen](present, gate_logits, columns)


class _SpanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        start_logits: Tensor,
        end_logits: Tensor,
        start_positive: Tensor,
        end_positive: Tensor,
        valid: Tensor,
        document: Tensor,
    ) -> Tensor:
        inputs = (start_logits, end_logits, start_positive, end_positive, valid, document)
        loss, stats = _SPAN_FWD[backend](*inputs)
        ctx.save_for_backward(*inputs, stats)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, stats = ctx.saved_tensors
        _, need_start, need_end, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            wanted = ((inputs[0], need_start), (inputs[1], need_end))
            grads = differentiable_backward([reference.span_loss(*inputs)], [grad], wanted)
            return None, *grads, None, None, None, None
        d_start, d_end = _SPAN_BWD[ctx.backend](grad, *inputs, stats)
        return None, d_start if need_start else None, d_end if need_end else None, None, None, None, None


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positive: Tensor,
    end_positive: Tensor,
    valid: Tensor,
    document: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Extractive question answering over documents of many segments: one softmax over a whole document.

    For each document, -log of the probability mass on all its positive positions, where the softmax runs over every
    valid token of every one of its segments; start and end averaged, mean over the documents that have an answer.

    Args:
        start_logits, end_logits: (N, T) float, N segments of T tokens.
        start_positive, end_positive: (N, T) bool, every position that is right; what is not valid does not count.
        valid: (N, T) bool, tokens that may be an answer.
        document: (N,) int64 in [0, N), which document each segment belongs to; others are in no document.
        backend: see :mod:`memkern.backends`.

    Returns:
        () float32 (float64 for float64); 0 when no document has both a start and an end.

    Raises:
        ValueError, TypeError: a bad argument, named.

    Source: Clark and Gardner, "Simple and Effective Multi-Paragraph Reading Comprehension" (2018), shared-norm
        objective.
    """
    _checks.floating("start_logits", start_logits, ("N", "T"))
    shape = tuple(start_logits.shape)
    _checks.floating("end_logits", end_logits, shape, start_logits, "start_logits")
    masks = (("start_positive", start_positive), ("end_positive", end_positive), ("valid", valid))
    for name, value in masks:
        _checks.mask(name, value, shape, start_logits, "start_logits")
    _checks.integer("document", document, shape[:1], start_logits, "start_logits")
    if _checks.values_enabled():
        _checks.no_nan("start_logits", start_logits, valid)
        _checks.no_nan("end_logits", end_logits, valid)
        _checks.in_range("document", document, 0, shape[0] - 1)
    chosen = backends.select("span_loss", backend, start_logits, end_logits)
    inputs = (start_logits, end_logits, start_positive, end_positive, valid, document)
    if chosen == "reference" or needs_reference():
        return reference.span_loss(*inputs)
    if gradient_needed(start_logits, end_logits):
        return _SpanLoss.apply(chosen, *inputs)
    return _SPAN_FWD[chosen](*inputs)[0]
