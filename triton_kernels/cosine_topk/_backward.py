"""Gradients of the search: coefficients of each pair, then sums over the ranks of a query and the finders of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common import cast
from ._score import fold, inverse_root, rounded_inverse


@triton.jit
def coefficients(
    grad, queries, database, indices, inverse_norms, count, rows, width, k,
    row_in_query, query_in_query, query_in_row, row_in_row,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For ROWS places of one query: d query = row_in_query x + query_in_query q, d row = query_in_row q + row_in_row x.

    d score / d query = a b x - s b^2 q, d score / d row = a b q - s a^2 x, a and b the inverse norms of row and query;
    a given inverse norm counts for the query alone.
    """
    index = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_k = place < k
    row = tl.load(indices + index * k + place, mask=inside_k, other=-1)
    there = row >= 0
    row = tl.where(there, row, 0)
    g = tl.where(there, tl.load(grad + index * k + place, mask=there, other=0.0), 0.0).to(tl.float64)
    start = database + index // count * rows * width
    products = tl.zeros((ROWS, BLOCK), tl.float64)
    row_squares = tl.zeros((ROWS, BLOCK), tl.float64)
    query_squares = tl.zeros((1, BLOCK), tl.float64)
    if not NORMALIZED:
        for at in range(0, width, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            inside = columns < width
            q = tl.load(queries + index * width + columns, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            at_row = start + row[:, None] * width + columns[None, :]
            x = tl.load(at_row, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32).to(tl.float64)
            products += q[None, :] * x
            row_squares += x * x
            query_squares += q[None, :] * q[None, :]
        own = rounded_inverse(fold(row_squares, ROWS, BLOCK)).to(tl.float64)
        b = inverse_root(tl.sum(query_squares))
        used = own
        if GIVEN:
            used = tl.load(inverse_norms + index // count * rows + row, mask=there, other=0.0).to(tl.float64)
        cosine = fold(products, ROWS, BLOCK) * b
        to_row = g * used * b
        to_query = -g * cosine * used * b * b
        of_query = g * own * b
        of_row = -g * cosine * own * own * own
    else:
        to_row = g
        of_query = g
        to_query = g * 0
        of_row = g * 0
    out = index * k + place
    tl.store(row_in_query + out, to_row.to(tl.float32), mask=inside_k)
    tl.store(query_in_query + out, to_query.to(tl.float32), mask=inside_k)
    tl.store(query_in_row + out, of_query.to(tl.float32), mask=inside_k)
    tl.store(row_in_row + out, of_row.to(tl.float32), mask=inside_k)


@triton.jit
def query_gradient(
    queries, database, indices, row_in_query, query_in_query, out, count, rows, width, k, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = database + index // count * rows * width
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((), tl.float32)
    for rank in range(k):
        row = tl.load(indices + index * k + rank)
        if row >= 0:
            x = tl.load(start + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(row_in_query + index * k + rank) * x
            along += tl.load(query_in_query + index * k + rank)
    q = tl.load(queries + index * width + columns, mask=inside, other=0.0).to(tl.float32)
    # A query that is not finite found nothing, and gets no gradient.
    total = tl.where(along != 0, total + along * q, total)
    tl.store(out + index * width + columns, cast(total, out.dtype.element_ty), mask=inside)


@triton.jit
def row_gradient(
    queries, database, sorted_rows, order, query_in_row, row_in_row, out, count, rows, width, k, places,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first place that found a row adds up all of them, in the order (query, rank)."""
    here = tl.program_id(0).to(tl.int64)
    search = here // places
    row = tl.load(sorted_rows + here)
    before = tl.load(sorted_rows + here - 1, mask=here % places > 0, other=-2)
    if (row >= 0) & (row != before):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.zeros((BLOCK,), tl.float32)
        along = tl.zeros((), tl.float32)
        at = here
        same = row
        last = (search + 1) * places
        while same == row:
            place = search * places + tl.load(order + at)
            q = tl.load(queries + place // k * width + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(query_in_row + place) * q
            along += tl.load(row_in_row + place)
            at += 1
            same = tl.load(sorted_rows + at, mask=at < last, other=-2)
        to = (search * rows + row) * width + columns
        x = tl.load(database + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + to, cast(total + along * x, out.dtype.element_ty), mask=inside)


@triton.jit
def norms_forward(database, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        x = tl.load(database + row[:, None] * width + columns[None, :], mask=inside, other=0.0)
        wide = x.to(tl.float32).to(tl.float64)
        squares += wide * wide
    # In the order of the search's own norms, so that given ones change no bit of a score.
    tl.store(out + row, rounded_inverse(fold(squares, ROWS, BLOCK)), mask=row < rows)


@triton.jit
def norms_backward(grad, database, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """d (1 / |x|) / dx = -x / |x|^3."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), tl.float64)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        x = tl.load(database + row[:, None] * width + columns[None, :], mask=inside, other=0.0)
        wide = x.to(tl.float32).to(tl.float64)
        squares += tl.sum(wide * wide, 1)
    a = inverse_root(squares)
    g = tl.load(grad + row, mask=row < rows, other=0.0).to(tl.float64)
    factor = -g * a * a * a
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        to = row[:, None] * width + columns[None, :]
        x = tl.load(database + to, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        value = tl.where(a[:, None] == 0, 0.0, factor[:, None] * x)
        tl.store(out + to, cast(value.to(tl.float32), out.dtype.element_ty), mask=inside)
