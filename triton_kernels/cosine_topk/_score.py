"""The score of one query and some rows in a fixed order, and the packed keys by which rows are compared."""

from __future__ import annotations

import triton
import triton.language as tl

EXACT_ROWS = 16
"""Rows that are scored together; together with the width's block, all that a score's bits depend on."""

LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST_KEY = tl.constexpr(-(1 << 63))


def exact_block(width: int) -> int:
    """Columns of a step: a function of the width alone."""
    return max(16, min(256, triton.next_power_of_2(width)))


@triton.jit
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over the columns by elementwise additions of neighbours: no layout of the threads can change the order."""
    for _ in tl.static_range(12):
        if x.shape[1] > 1:
            a, b = tl.split(tl.reshape(x, (ROWS, x.shape[1] // 2, 2)))
            x = a + b
    return tl.reshape(x, (ROWS,))


@triton.jit
def inverse_root(squared):
    """1 / sqrt of float64, 0 for 0."""
    zero = squared == 0
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, squared)))


@triton.jit
def rounded_inverse(squared):
    """1 / |x| in float32; the inverse of a subnormal norm would overflow, and infinity times zero is NaN."""
    inverse = inverse_root(squared)
    return tl.where(inverse > LARGEST, LARGEST, inverse).to(tl.float32)


@triton.jit
def score_rows(
    query,  # pointer to its first element
    factor,  # the power of two that scales it
    query_inverse,  # float64
    database,  # pointer to the search's first row
    rows,  # (ROWS,) int64
    present,  # (ROWS,) bool
    row_stride,
    inverse_norms,  # pointer to the search's, or anything
    width,
    NORMALIZED: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(ROWS,) float32 scores, the same bits wherever a pair of query and row is met."""
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        q = tl.load(query + columns, mask=inside, other=0.0).to(tl.float32) * factor
        at = database + rows[:, None] * row_stride + columns[None, :]
        x = tl.load(at, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products = tl.fma(tl.broadcast_to(q[None, :], (ROWS, BLOCK)), x, products)
        if not NORMALIZED and not GIVEN:
            wide = x.to(tl.float64)
            squares += wide * wide
    dot = fold(products, ROWS, BLOCK)
    if NORMALIZED:
        return dot
    if GIVEN:
        inverse = tl.load(inverse_norms + rows, mask=present, other=0.0)
    else:
        inverse = rounded_inverse(fold(squares, ROWS, BLOCK))
    # Adding zero turns -0 into 0.
    return (dot.to(tl.float64) * inverse.to(tl.float64) * query_inverse).to(tl.float32) + 0.0


@triton.jit
def ordered(x):
    """float32 -> int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(bits):
    """The float32 of :func:`ordered` bits."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, row):
    """Keys that descend by (x descending, row ascending); rows below 2^32."""
    return (ordered(x).to(tl.int64) << 32) | (0xFFFFFFFF - row)


@triton.jit
def key_value(key):
    return unordered((key >> 32).to(tl.int32))


@triton.jit
def key_row(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)
