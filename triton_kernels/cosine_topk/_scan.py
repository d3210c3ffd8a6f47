"""The passes over all rows: queries and rows made ready, and the product that appends what may be among the k best.

A pass knows each score up to a margin. A row is kept when the upper end of its interval reaches the query's bound, the
k-th largest lower end so far; what is kept is appended as a packed key to the query's buffer. The order in which
programs append is not determined, the set that survives the bound is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._common import cast, mdot
from ._score import inverse_root, key_row, key_value, ordered, pack, rounded_inverse, score_rows, unordered

LEAST_LENGTH = tl.constexpr(1e-15)
MOST_LENGTH = tl.constexpr(1e15)


@triton.jit
def prepare_queries(
    queries, stride_search, stride_query, count, width,
    unit, factor, inverse, scale, margin, bound, appended, flagged,
    min_score, relative,
    NORMALIZED: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One query: its scale, its unit form in the scan's dtype, and how far a scan with it may be off.

    ``scale`` turns a score into what margins are measured in. ``relative``: the margin of a product of unit vectors
    without what rounding the query lost. ``ROUND``: the relative step of the scan's own rounding (TF32), or 0.
    """
    index = tl.program_id(0).to(tl.int64)
    start = queries + index // count * stride_search + index % count * stride_query
    largest = 0.0
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        q = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.where(q == q, tl.abs(q), 0.0)))
    power = 1.0
    if not NORMALIZED:
        # 2^-exponent from the bits; a subnormal or infinite maximum stays unscaled.
        bits = largest.to(tl.int32, bitcast=True) >> 23
        usable = (bits > 0) & (bits < 253)
        power = tl.where(usable, ((253 - bits) << 23).to(tl.float32, bitcast=True), 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        q = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32) * power
        squares += q.to(tl.float64) * q.to(tl.float64)
    squared = tl.sum(squares)
    inverted = inverse_root(squared)
    lost = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        q = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32) * power
        exact = q.to(tl.float64) * inverted
        rounded = cast(exact.to(tl.float32), unit.dtype.element_ty)
        tl.store(unit + index * width + columns, rounded, mask=columns < width)
        difference = exact - rounded.to(tl.float32).to(tl.float64)
        lost += difference * difference
    loss = tl.sqrt(tl.sum(lost))
    tl.store(factor + index, power)
    tl.store(margin + index, (1.001 * (relative + loss + ROUND)).to(tl.float32))
    tl.store(appended + index, 0)
    unit_of_score = 1.0
    outside = False
    if NORMALIZED:
        length = tl.sqrt(squared)
        # A query at the ends of the exponent range is searched exactly; NaN finds nothing either way.
        outside = (squared > 0) & ((length < LEAST_LENGTH) | (length > MOST_LENGTH))
        unit_of_score = tl.where(outside, 1.0, inverted).to(tl.float32)
        tl.store(inverse + index, inverted * 0 + 1.0)
    else:
        tl.store(inverse + index, inverted)
    tl.store(scale + index, unit_of_score)
    tl.store(flagged + index, outside.to(tl.int32) if NORMALIZED else 0)
    least = min_score * unit_of_score
    tl.store(bound + index, tl.where(least > -1e37, least - tl.abs(least) * 1e-6, least))


@triton.jit
def prepare_rows(
    database, stride_search, stride_row, count, width, weight,
    LENGTHS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / |x| of each row, or |x| for ``LENGTHS``; -1 for a row whose products may lose digits, NaN where x has."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    search = tl.program_id(1).to(tl.int64)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = (row < count)[:, None] & (columns < width)[None, :]
        start = database + search * stride_search + row[:, None] * stride_row
        x = tl.load(start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += x.to(tl.float64) * x.to(tl.float64)
    squared = tl.sum(squares, 1)
    length = tl.sqrt(squared)
    value = length.to(tl.float32) if LENGTHS else rounded_inverse(squared)
    odd = (squared > 0) & ((length < LEAST_LENGTH) | ((length > MOST_LENGTH) & (length < 1e300)))
    tl.store(weight + search * count + row, tl.where(odd, -1.0, value), mask=row < count)


@triton.jit
def upper_end(product, weight, given, margin, NORMALIZED: tl.constexpr, GIVEN: tl.constexpr):
    """Upper end of a score's interval, from the row's weight (and given inverse norm)."""
    if NORMALIZED:
        middle = product
        half = margin * weight
    elif GIVEN:
        middle = product * given
        half = margin * weight * tl.abs(given)
    else:
        middle = product * weight
        # A zero row scores 0, whatever its products.
        half = tl.where(weight == weight, margin + weight * 0, weight)
    return tl.where(weight == -1.0, float("inf"), middle + half)


@triton.jit
def halves(product, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The left and the right half of a tile's columns; each thread holds parts of both."""
    return tl.split(tl.permute(tl.reshape(product, (BLOCK_N, 2, BLOCK_Q // 2)), (0, 2, 1)))


@triton.jit
def append(
    product, query, search, row, row_in, w, g, margin, bound, buffer, appended,
    valid, valid_search, valid_query, valid_row, query_group, row_group, queries, rows, capacity,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, VALID: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Keys of the pairs whose upper end reaches the query's bound, to the query's buffer."""
    query_in = query < queries
    at_query = search * queries + query
    m = tl.load(margin + at_query, mask=query_in, other=0.0)
    least = tl.load(bound + at_query, mask=query_in, other=float("inf"))
    upper = upper_end(product, w[:, None], g[:, None], m[None, :], NORMALIZED, GIVEN)
    # A query that is not finite has no scores; its products are NaN, a special row's infinity is not.
    keep = (upper >= least[None, :]) & (product == product) & row_in[:, None] & query_in[None, :]
    if VALID:
        v = valid + search * valid_search + query[None, :].to(tl.int64) * valid_query + row[:, None] * valid_row
        keep = keep & (tl.load(v, mask=keep, other=0) != 0)
    if GROUPS:
        own = tl.load(query_group + at_query, mask=query_in, other=0)
        of_row = tl.load(row_group + search * rows + row, mask=row_in, other=0)
        keep = keep & (own[None, :] == of_row[:, None])
    if tl.max(keep.to(tl.int32)) > 0:
        counter = appended + tl.broadcast_to(at_query[None, :], (BLOCK_N, BLOCK_Q))
        place = tl.atomic_add(counter, 1, mask=keep, sem="relaxed")
        keys = pack(upper, tl.broadcast_to(row[:, None], (BLOCK_N, BLOCK_Q)))
        slot = buffer + at_query[None, :] * capacity + place
        tl.store(slot, keys, mask=keep & (place < capacity))


@triton.jit(do_not_specialize=["tiles", "first_tile", "step_tile"])
def scan(
    unit, database, stride_search, stride_row, weight, given, margin, bound, buffer, appended,
    valid, valid_search, valid_query, valid_row, query_group, row_group,
    queries, rows, width, tiles, first_tile, step_tile, capacity,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, INLINE: tl.constexpr, VALID: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of rows against a tile of queries.

    Program p of axis 1 takes tile ``(first_tile + p) * step_tile mod tiles``: with a step that has no factor in common
    with ``tiles``, any run of p is spread over all rows. ``INLINE``: the norms are taken on the way, and ``weight`` is
    not read.
    """
    search = tl.program_id(2).to(tl.int64)
    tile = (first_tile + tl.program_id(1)).to(tl.int64) * step_tile % tiles
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    query_block = tl.program_id(0) * BLOCK_Q
    query = query_block + tl.arange(0, BLOCK_Q)
    row_in, query_in = row < rows, query < queries
    x_at = database + search * stride_search + row[:, None] * stride_row
    q_at = unit + (search * queries + query)[None, :] * width
    product = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for at in range(0, width, BLOCK_D):
        columns = at + tl.arange(0, BLOCK_D)
        inside = columns < width
        x = tl.load(x_at + columns[None, :], mask=row_in[:, None] & inside[None, :], other=0.0)
        q = tl.load(q_at + columns[:, None], mask=query_in[None, :] & inside[:, None], other=0.0)
        product = mdot(x, q, product, PRECISION)
        if INLINE:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
    if INLINE:
        length = tl.sqrt(squares)
        odd = (squares != 0) & ((length < LEAST_LENGTH) | ((length > MOST_LENGTH) & (length == length)))
        # Squares that underflow to zero may belong to a row that is none.
        w = tl.where(squares == 0, -1.0, 1.0 / tl.where(squares == 0, 1.0, length))
        w = tl.where(odd, -1.0, w)
    else:
        w = tl.load(weight + search * rows + row, mask=row_in, other=float("nan"))
    g = w
    if GIVEN:
        g = tl.load(given + search * rows + row, mask=row_in, other=float("nan"))
    # In halves of the queries: what an append needs in registers, it needs for half the tile at a time.
    first, second = halves(product, BLOCK_N, BLOCK_Q)
    for half in tl.static_range(2):
        append(
            first if half == 0 else second, query_block + half * (BLOCK_Q // 2) + tl.arange(0, BLOCK_Q // 2),
            search, row, row_in, w, g, margin, bound, buffer, appended,
            valid, valid_search, valid_query, valid_row, query_group, row_group, queries, rows, capacity,
            NORMALIZED, GIVEN, VALID, GROUPS, BLOCK_N, BLOCK_Q // 2,
        )  # fmt: skip


@triton.jit
def tighten(
    buffer, appended, flagged, bound, margin, weight, given, queries, rows, k, capacity,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query: its bound becomes the k-th largest lower end in its buffer, and what lies below is dropped.

    A buffer that overflowed has lost rows: the query is flagged, and searched exactly by :func:`rescue`.
    """
    index = tl.program_id(0).to(tl.int64)
    search = index // queries
    count = tl.load(appended + index)
    if count > capacity:
        tl.store(flagged + index, 1)
        tl.store(bound + index, float("inf"))  # nothing more is appended
        tl.store(appended + index, 0)
        count = 0
    if count > k:
        keys = buffer + index * capacity
        m = tl.load(margin + index)
        # Bit by bit: the largest value that at least k lower ends reach, as unsigned 32 bits in the order of floats.
        # Once k ends reach a value and no more, its lower bits do not matter.
        value = tl.zeros((), tl.int64)
        bit = 31
        exact = count < k
        while (bit >= 0) & (exact == 0):
            candidate = value | (tl.full((), 1, tl.int64) << bit)
            bit -= 1
            reached = tl.zeros((), tl.int32)
            for at in range(0, count, BLOCK):
                place = at + tl.arange(0, BLOCK)
                key = tl.load(keys + place, mask=place < count, other=0)
                upper = unordered((key >> 32).to(tl.int32))
                half = m
                if NORMALIZED or GIVEN:
                    row = search * rows + (0xFFFFFFFF - (key & 0xFFFFFFFF))
                    half = m * tl.load(weight + row, mask=place < count, other=0.0)
                    if GIVEN:
                        half = half * tl.abs(tl.load(given + row, mask=place < count, other=0.0))
                low = upper - 2.0 * half
                # Infinity marks a special row, about which nothing is known; rounding may not lift the end either.
                low = tl.where(upper == float("inf"), -float("inf"), low - tl.abs(low) * 1e-6)
                biased = ordered(low).to(tl.int64) + 0x80000000
                reached += tl.sum(((biased >= candidate) & (place < count)).to(tl.int32))
            value = tl.where(reached >= k, candidate, value)
            exact = reached == k
        least = tl.maximum(tl.load(bound + index), unordered((value - 0x80000000).to(tl.int32)))
        tl.store(bound + index, least)
        kept = tl.zeros((), tl.int32)
        for at in range(0, count, BLOCK):
            place = at + tl.arange(0, BLOCK)
            key = tl.load(keys + place, mask=place < count, other=0)
            keep = (place < count) & (key_value(key) >= least)
            to = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
            # In place: what is written lies at or before what was read.
            tl.debug_barrier()
            tl.store(keys + to, key, mask=keep)
            kept += tl.sum(keep.to(tl.int32))
        tl.store(appended + index, kept)


@triton.jit
def rescore(
    buffer, appended, flagged, queries_at, stride_search_q, stride_query, factor, inverse,
    database, stride_search, stride_row, inverse_norms, queries, rows, width, capacity, min_score,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to ROWS survivors of one query: their keys become those of their scores, or the lowest."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    count = tl.load(appended + index)
    if (first < count) & (tl.load(flagged + index) == 0):
        search = index // queries
        place = first + tl.arange(0, ROWS)
        there = place < count
        at = buffer + index * capacity + place
        row = tl.where(there, key_row(tl.load(at, mask=there, other=0)), 0)
        query = queries_at + search * stride_search_q + index % queries * stride_query
        score = score_rows(
            query, tl.load(factor + index), tl.load(inverse + index), database + search * stride_search, row, there,
            stride_row, inverse_norms + search * rows, width, NORMALIZED, GIVEN, ROWS, BLOCK,
        )  # fmt: skip
        tl.store(at, tl.where(score >= min_score, pack(score, row), -(1 << 63)), mask=there)


@triton.jit
def keep_best(keys, count, k, BLOCK: tl.constexpr):
    """The k best of ``count`` exact keys move to the front; returns how many there are then."""
    value = tl.zeros((), tl.int64) - 0x7FFFFFFFFFFFFFFF - 1
    bit = 63
    exact = count <= k
    while (bit >= 0) & (exact == 0):
        # Adding the bits of an unsigned number to the lowest signed one keeps the order.
        candidate = tl.where(bit == 63, tl.zeros((), tl.int64), value + (tl.full((), 1, tl.int64) << bit))
        bit -= 1
        reached = tl.zeros((), tl.int32)
        for at in range(0, count, BLOCK):
            place = at + tl.arange(0, BLOCK)
            key = tl.load(keys + place, mask=place < count, other=-(1 << 63))
            reached += tl.sum(((key >= candidate) & (place < count)).to(tl.int32))
        value = tl.where(reached >= k, candidate, value)
        exact = reached == k
    kept = tl.zeros((), tl.int32)
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        key = tl.load(keys + place, mask=place < count, other=-(1 << 63))
        keep = (place < count) & (key >= value) & (key != -(1 << 63))
        to = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.debug_barrier()
        tl.store(keys + to, key, mask=keep)
        kept += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()
    return kept


@triton.jit
def rescue(
    buffer, appended, flagged, queries_at, stride_search_q, stride_query, factor, inverse,
    database, stride_search, stride_row, inverse_norms,
    valid, valid_search, valid_query, valid_row, query_group, row_group,
    queries, rows, width, k, capacity, min_score,
    NORMALIZED: tl.constexpr, GIVEN: tl.constexpr, VALID: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A flagged query against every row, exactly: for scores that no margin tells apart, and zero queries."""
    index = tl.program_id(0).to(tl.int64)
    if tl.load(flagged + index) != 0:
        search = index // queries
        query = index % queries
        keys = buffer + index * capacity
        query_inverse = tl.load(inverse + index)
        # Every score of a zero query is 0, so that the first rows win.
        zero = query_inverse == 0
        count = tl.zeros((), tl.int32)
        first = tl.zeros((), tl.int64)
        while (first < rows) & ((zero == 0) | (count < k)):
            row = first + tl.arange(0, ROWS)
            there = row < rows
            if VALID:
                v = valid + search * valid_search + query * valid_query + row * valid_row
                there = there & (tl.load(v, mask=there, other=0) != 0)
            if GROUPS:
                of_row = tl.load(row_group + search * rows + row, mask=there, other=0)
                there = there & (of_row == tl.load(query_group + index))
            score = score_rows(
                queries_at + search * stride_search_q + query * stride_query, tl.load(factor + index), query_inverse,
                database + search * stride_search, row, there, stride_row, inverse_norms + search * rows, width,
                NORMALIZED, GIVEN, ROWS, BLOCK,
            )  # fmt: skip
            keep = there & (score >= min_score)
            if count + ROWS > capacity:
                tl.debug_barrier()
                count = keep_best(keys, count, k, BLOCK_KEYS)
            to = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(keys + to, pack(score, row), mask=keep)
            count += tl.sum(keep.to(tl.int32))
            first += ROWS
        tl.store(appended + index, count)


@triton.jit
def finish(
    buffer, appended, scores, indices, k, capacity, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k best of a query's exact keys in order, padded with (-inf, -1)."""
    index = tl.program_id(0).to(tl.int64)
    keys = buffer + index * capacity
    count = keep_best(keys, tl.load(appended + index), k, BLOCK)
    place = tl.arange(0, K)
    key = tl.load(keys + place, mask=place < count, other=-(1 << 63))
    key = tl.sort(key, descending=True)
    there = place < count
    tl.store(scores + index * k + place, tl.where(there, key_value(key), -float("inf")), mask=place < k)
    tl.store(indices + index * k + place, tl.where(there, key_row(key), -1), mask=place < k)
