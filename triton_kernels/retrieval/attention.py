"""Attention over retrieved pairs in Triton.

It moves each key and value once forward, and once in and once out backward; its scores are products of floats in
registers, since matrix units have nothing to reuse at one operation per byte. Only the log sum exp is kept for
backward.

A bank's gradient is a sum over the queries that retrieved each row. Its entries (query, pair) are sorted by row, with
a stable sort, and every row adds its own in that order: no atomics, the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import LAUNCH, adjacent, cast, on_device

TILE = 4096
"""Elements of keys, and of values, that one program of the attention kernels holds at a time."""


@triton.jit
def _split(row, heads, count):
    """Row (int32, for a cheap division) of the flattened (B, A, T) -> (b, a, t), int64."""
    plane = row // count
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), (row % count).to(tl.int64)


@triton.jit
def _pairs(
    indices, mask, b, a, t, c, ok, bank, sib, sia, sit, sic, smb, sma, smt, smc,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Where the pairs ``c`` of each query lie along the keys' pair axis, and which of them take part."""
    at = tl.broadcast_to(c.to(tl.int64)[None, :], ok.shape)
    if HAS_MASK:
        pointers = mask + (b * smb + a * sma + t * smt)[:, None] + at * smc
        ok = ok & (tl.load(pointers, mask=ok, other=0) != 0)
    if HAS_INDICES:
        pointers = indices + (b * sib + a * sia + t * sit)[:, None] + at * sic
        at = tl.load(pointers, mask=ok, other=-1)
        ok = ok & (at >= 0) & (at < bank)
    return at, ok


@triton.jit
def _attention_fwd(
    queries, keys, values, indices, mask, out, lse, rows, heads, count, pairs, bank, scale,
    sqb, sqa, sqt, skb, ska, skt, skc, svb, sva, svt, svc, sib, sia, sit, sic, smb, sma, smt, smc,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = row < rows
    b, a, t = _split(row, heads, count)
    row = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_at = (b * sqb + a * sqa + t * sqt)[:, None] + d[None, :]
    q = tl.load(queries + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32) * scale
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, pairs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        ok = live[:, None] & (c < pairs)[None, :]
        at, ok = _pairs(
            indices, mask, b, a, t, c, ok, bank, sib, sia, sit, sic, smb, sma, smt, smc, HAS_INDICES, HAS_MASK
        )
        inside = ok[:, :, None] & (d < D)[None, None, :]
        k_at = (b * skb + a * ska + t * skt)[:, None] + at * skc
        v_at = (b * svb + a * sva + t * svt)[:, None] + at * svc
        # Both loads are on their way before the first reduction waits.
        k = tl.load(keys + k_at[:, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + v_at[:, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        score = tl.where(ok, tl.sum(q[:, None, :] * k, axis=2), float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp(score - base[:, None])
        keep = tl.exp(best - base)
        mass = mass * keep + tl.sum(weight, axis=1)
        total = total * keep[:, None] + tl.sum(weight[:, :, None] * v, axis=1)
        best = new_best
    some = mass != 0.0
    mass = tl.where(some, mass, 1.0)
    result = tl.where(some[:, None], total / mass[:, None], 0.0)
    stored = out + row[:, None] * D + d[None, :]
    tl.store(stored, cast(result, out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    tl.store(lse + row, tl.where(some, best + tl.log(mass), float("-inf")), mask=live)


@triton.jit
def _attention_bwd(
    grad, queries, keys, values, indices, mask, out, lse, d_queries, d_keys, d_values, delta, owner,
    rows, heads, count, pairs, bank, nobody, scale,
    sgb, sga, sgt, sqb, sqa, sqt, skb, ska, skt, skc, svb, sva, svt, svc, sib, sia, sit, sic, smb, sma, smt, smc,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, NEED_QUERIES: tl.constexpr, NEED_PAIRS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and own pairs; with a bank, of queries, and what :func:`_bank_bwd` reads."""
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = row < rows
    b, a, t = _split(row, heads, count)
    row = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = live[:, None] & (d < D)[None, :]
    q_at = (b * sqb + a * sqa + t * sqt)[:, None] + d[None, :]
    g_at = (b * sgb + a * sga + t * sgt)[:, None] + d[None, :]
    q = tl.load(queries + q_at, mask=wide, other=0.0).to(tl.float32) * scale
    g = tl.load(grad + g_at, mask=wide, other=0.0).to(tl.float32)
    log_mass = tl.load(lse + row, mask=live, other=0.0)
    dot = tl.zeros((BLOCK_Q,), tl.float32)
    if not ONE_BLOCK:
        o = tl.load(out + row[:, None] * D + d[None, :], mask=wide, other=0.0).to(tl.float32)
        dot = tl.sum(g * o, axis=1)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, pairs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = live[:, None] & (c < pairs)[None, :]
        at, ok = _pairs(
            indices, mask, b, a, t, c, inside, bank, sib, sia, sit, sic, smb, sma, smt, smc, HAS_INDICES, HAS_MASK
        )
        loaded = ok[:, :, None] & (d < D)[None, None, :]
        k_at = (b * skb + a * ska + t * skt)[:, None] + at * skc
        v_at = (b * svb + a * sva + t * svt)[:, None] + at * svc
        k = tl.load(keys + k_at[:, :, None] + d[None, None, :], mask=loaded, other=0.0).to(tl.float32)
        v = tl.load(values + v_at[:, :, None] + d[None, None, :], mask=loaded, other=0.0).to(tl.float32)
        score = tl.sum(q[:, None, :] * k, axis=2)
        weight = tl.where(ok, tl.exp(score - log_mass[:, None]), 0.0)
        d_weight = tl.sum(g[:, None, :] * v, axis=2)
        if ONE_BLOCK:
            # In registers the sum is exact where the stored output has been rounded.
            dot = tl.sum(weight * d_weight, axis=1)
        d_score = tl.where(ok, weight * (d_weight - dot[:, None]), 0.0)
        if NEED_QUERIES:
            total += tl.sum(d_score[:, :, None] * k, axis=1)
        if NEED_PAIRS:
            slot = row[:, None] * pairs + c[None, :]
            if HAS_INDICES:
                number = ((b * heads + a) * bank)[:, None] + at
                tl.store(owner + slot, tl.where(ok, number, nobody).to(tl.int32), mask=inside)
            else:
                stored = inside[:, :, None] & (d < D)[None, None, :]
                to = slot[:, :, None] * D + d[None, None, :]
                # Where a pair takes no part, zero even if the query is not finite.
                d_k = tl.where(ok[:, :, None], d_score[:, :, None] * q[:, None, :], 0.0)
                d_v = tl.where(ok[:, :, None], weight[:, :, None] * g[:, None, :], 0.0)
                tl.store(d_keys + to, cast(d_k, d_keys.dtype.element_ty), mask=stored)
                tl.store(d_values + to, cast(d_v, d_values.dtype.element_ty), mask=stored)
    if NEED_QUERIES:
        tl.store(d_queries + row[:, None] * D + d[None, :], cast(total * scale, d_queries.dtype.element_ty), mask=wide)
    if HAS_INDICES and NEED_PAIRS:
        tl.store(delta + row, dot, mask=live)


@triton.jit
def _first_at_least(owner, wanted, entries, steps):
    """Position of the first of the sorted ``owner`` that is not below ``wanted``."""
    low = tl.zeros_like(wanted)
    high = tl.zeros_like(wanted) + entries
    for _ in range(steps):
        middle = low + (high - low) // 2
        below = tl.load(owner + middle, mask=low < high, other=0) < wanted
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where((low < high) & ~below, middle, high)
    return low


@triton.jit
def _bank_bwd(
    grad, queries, keys, values, lse, delta, owner, order, d_keys, d_values,
    heads, count, pairs, bank, total_rows, entries, steps, scale,
    sgb, sga, sgt, sqb, sqa, sqt, skb, ska, skc, svb, sva, svc,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each bank row adds up the queries that retrieved it, in the order of (t, c)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < total_rows
    b, a, m = _split(row, heads, bank)
    row = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = live[:, None] & (d < D)[None, :]
    k_at = (b * skb + a * ska + m * skc)[:, None] + d[None, :]
    v_at = (b * svb + a * sva + m * svc)[:, None] + d[None, :]
    k = tl.load(keys + k_at, mask=wide, other=0.0).to(tl.float32)
    v = tl.load(values + v_at, mask=wide, other=0.0).to(tl.float32)
    first = _first_at_least(owner, row.to(tl.int32), entries, steps)
    last = tl.where(live, _first_at_least(owner, row.to(tl.int32) + 1, entries, steps), first)
    d_k = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, tl.max(last - first, axis=0), BLOCK_E):
        place = (first + start)[:, None] + tl.arange(0, BLOCK_E)[None, :]
        ok = place < last[:, None]
        query = tl.load(order + place, mask=ok, other=0).to(tl.int32) // pairs
        t = (query % count).to(tl.int64)
        loaded = ok[:, :, None] & (d < D)[None, None, :]
        q_at = (b * sqb + a * sqa)[:, None] + t * sqt
        g_at = (b * sgb + a * sga)[:, None] + t * sgt
        q = tl.load(queries + q_at[:, :, None] + d[None, None, :], mask=loaded, other=0.0).to(tl.float32) * scale
        g = tl.load(grad + g_at[:, :, None] + d[None, None, :], mask=loaded, other=0.0).to(tl.float32)
        log_mass = tl.load(lse + query, mask=ok, other=0.0)
        dot = tl.load(delta + query, mask=ok, other=0.0)
        score = tl.sum(q * k[:, None, :], axis=2)
        weight = tl.where(ok, tl.exp(score - log_mass), 0.0)
        d_score = tl.where(ok, weight * (tl.sum(g * v[:, None, :], axis=2) - dot), 0.0)
        d_k += tl.sum(d_score[:, :, None] * q, axis=1)
        d_v += tl.sum(weight[:, :, None] * g, axis=1)
    to = row[:, None] * D + d[None, :]
    tl.store(d_keys + to, cast(d_k, d_keys.dtype.element_ty), mask=wide)
    tl.store(d_values + to, cast(d_v, d_values.dtype.element_ty), mask=wide)


def _tile(pairs: int, width: int) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK_C, BLOCK_D): a whole row of pairs where it fits, several queries where it is short."""
    block_d = triton.next_power_of_2(max(width, 1))
    tile = TILE if width % 8 == 0 else TILE // 4  # without wide loads every element needs registers for its address
    block_c = min(triton.next_power_of_2(max(pairs, 1)), max(1, tile // block_d))
    return max(1, min(16, tile // (block_c * block_d))), block_c, block_d


def _warps(block_d: int) -> int:
    return 4 if block_d <= TILE else min(16, 4 * block_d // TILE)


def _registers(warps: int, most: int) -> dict[str, int]:
    """Left alone, the assembler may spill a few registers to make room for one block more."""
    return {"num_warps": warps, "maxnreg": min(most, 2048 // warps)}


def _pair_strides(x: Tensor, own: bool) -> tuple[int, int, int, int]:
    """Strides over b, a, t and the pair; a bank has no t."""
    return (*x.stride()[:4],) if own else (x.stride(0), x.stride(1), 0, x.stride(2))  # type: ignore[return-value]


def _check_size(what: str, size: int) -> None:
    if size >= 2**31:
        raise ValueError(f"{what}: expected fewer than 2^31, got {size}; split the batch")


def _optional_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def retrieved_attention_fwd(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::retrieved_attention_fwd``: one launch."""
    batch, heads, count, width = queries.shape
    out = torch.empty((batch, heads, count, width), dtype=queries.dtype, device=queries.device)
    lse = torch.empty((batch, heads, count), dtype=torch.float32, device=queries.device)
    rows, own = lse.numel(), indices is None
    if rows == 0:
        return out, lse
    _check_size("queries (B A T)", rows)
    q, k, v = adjacent(queries), adjacent(keys), adjacent(values)
    pairs, bank = (keys.shape[3], 0) if indices is None else (indices.shape[3], keys.shape[2])
    block_q, block_c, block_d = _tile(pairs, width)
    with on_device(queries):
        _attention_fwd[(triton.cdiv(rows, block_q),)](
            q, k, v, q if indices is None else indices, q if mask is None else mask, out, lse,
            rows, heads, count, pairs, bank, scale,
            *q.stride()[:3], *_pair_strides(k, own), *_pair_strides(v, own),
            *_optional_strides(indices), *_optional_strides(mask),
            HAS_INDICES=not own, HAS_MASK=mask is not None, D=width,
            BLOCK_Q=block_q, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=_warps(block_d), **LAUNCH,
        )  # fmt: skip
    return out, lse


def retrieved_attention_bwd(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_queries: bool,
    need_pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::retrieved_attention_bwd``: one launch, with a bank two and a sort."""
    batch, heads, count, width = queries.shape
    device = queries.device
    d_queries = torch.empty(queries.shape if need_queries else (0,), dtype=queries.dtype, device=device)
    d_keys = torch.empty(keys.shape if need_pairs else (0,), dtype=keys.dtype, device=device)
    d_values = torch.empty(values.shape if need_pairs else (0,), dtype=values.dtype, device=device)
    rows, own = lse.numel(), indices is None
    pairs, bank = (keys.shape[3], 0) if indices is None else (indices.shape[3], keys.shape[2])
    if rows == 0:
        return d_queries, d_keys.zero_(), d_values.zero_()
    _check_size("queries (B A T)", rows)
    g, q, k, v = adjacent(grad), adjacent(queries), adjacent(keys), adjacent(values)
    by_row = not own and need_pairs and bank > 0
    total_rows = batch * heads * bank
    delta = torch.empty(rows if by_row else 0, dtype=torch.float32, device=device)
    if by_row:
        _check_size("keys (B A M)", total_rows)
        _check_size("indices (B A T C)", rows * pairs)
    owner = torch.empty(rows * pairs if by_row else 0, dtype=torch.int32, device=device)
    block_q, block_c, block_d = _tile(pairs, width)
    query_strides = (*g.stride()[:3], *q.stride()[:3])
    warps = _warps(block_d)
    with on_device(queries):
        # Few enough registers for twelve warps on a multiprocessor.
        _attention_bwd[(triton.cdiv(rows, block_q),)](
            g, q, k, v, q if indices is None else indices, q if mask is None else mask, out, lse,
            d_queries, d_keys, d_values, delta, owner, rows, heads, count, pairs, bank, total_rows, scale,
            *query_strides, *_pair_strides(k, own), *_pair_strides(v, own),
            *_optional_strides(indices), *_optional_strides(mask),
            HAS_INDICES=not own, HAS_MASK=mask is not None, NEED_QUERIES=need_queries,
            NEED_PAIRS=need_pairs if own else by_row, ONE_BLOCK=pairs <= block_c, D=width,
            BLOCK_Q=block_q, BLOCK_C=block_c, BLOCK_D=block_d, **_registers(warps, 168), **LAUNCH,
        )  # fmt: skip
        if by_row:
            entries = owner.numel()
            owner, order = torch.sort(owner, stable=True)
            block_e = max(1, min(16, TILE // block_d))
            block_r = max(1, min(4, (TILE if width % 8 == 0 else TILE // 4) // (block_e * block_d)))
            _bank_bwd[(triton.cdiv(total_rows, block_r),)](
                g, q, k, v, lse, delta, owner, order, d_keys, d_values,
                heads, count, pairs, bank, total_rows, entries, entries.bit_length(), scale,
                *query_strides, *k.stride()[:3], *v.stride()[:3],
                D=width, BLOCK_R=block_r, BLOCK_E=block_e, BLOCK_D=block_d, **_registers(warps, 255), **LAUNCH,
            )  # fmt: skip
    return d_queries, d_keys, d_values
