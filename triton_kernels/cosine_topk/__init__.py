"""Exact top-k cosine search: launchers of the search, its gradients, and inverse norms.

The search runs in rounds. The first takes as many rows as a query's buffer holds, spread over the database; their k-th
best lower end is a bound that the next round, several times larger, appends against, and so on until all rows were
seen once. What is left is scored exactly, in a fixed order, and sorted. Workspaces and launches depend on sizes alone,
so that a CUDA graph can hold the search. A query whose buffer overflowed is searched again, exactly, on the device.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .._common import ALL_REGISTERS, on_device
from . import _backward, _scan
from ._score import EXACT_ROWS, exact_block

__all__ = ["cosine_topk_bwd", "cosine_topk_fwd", "inverse_norms_bwd", "inverse_norms_fwd"]

FEW_QUERIES = 16
# By dtype of the scan and whether queries are few: rows, queries and columns of a tile, warps, stages.
TILES = {
    (torch.bfloat16, False): (128, 128, 64, 8, 3),
    (torch.float16, False): (128, 128, 64, 8, 3),
    (torch.float32, False): (128, 64, 32, 8, 3),
    (torch.bfloat16, True): (128, 16, 128, 8, 4),
    (torch.float16, True): (128, 16, 128, 8, 4),
    (torch.float32, True): (128, 16, 64, 4, 4),
}


def capacity_of(k: int) -> int:
    """Survivors a query has room for, below the 64 k (at least 1024) that a search may use."""
    return max(512, 32 * k)


def rounds_of(tiles: int, tile_rows: int, k: int) -> list[tuple[int, int]]:
    """(first tile, tiles) of each round; the expected number of survivors stays at a quarter of the buffer."""
    capacity, least = capacity_of(k), max(k, 8)
    growth = max(2, capacity // (4 * least))
    done, found = 0, []
    size = max(1, capacity // tile_rows)
    while done < tiles:
        size = min(size, tiles - done)
        # A small rest joins its round: its survivors are few more.
        if tiles - done - size <= size // 4 and found:
            size = tiles - done
        found.append((done, size))
        done += size
        size = done * growth
    return found


def coprime_step(tiles: int) -> int:
    """A step near the golden section of ``tiles`` that visits every tile: each run of it is spread evenly."""
    step = max(1, int(tiles * 0.6180339887))
    while math.gcd(step, tiles) != 1:
        step += 1
    return step


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def cosine_topk_fwd(
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
    searches, count, width = queries.shape
    rows = database.shape[1]
    scores = queries.new_empty((searches, count, k), dtype=torch.float32)
    indices = queries.new_empty((searches, count, k), dtype=torch.int64)
    total = searches * count
    if total == 0:
        return scores, indices
    if rows == 0:
        return scores.fill_(-math.inf), indices.fill_(-1)
    q, x = _dense_rows(queries), _dense_rows(database)
    few = count <= FEW_QUERIES
    block_n, block_q, block_d, warps, stages = TILES[x.dtype, few]
    if any(extent % 16 for extent in (width, x.stride(0), x.stride(1))):
        block_d = 32  # without wide loads every element needs registers for its address
    block_d = min(block_d, max(16, triton.next_power_of_2(width)))
    given = inverse_norms is not None
    if inverse_norms is None:
        norms = scores
    else:
        norms = inverse_norms.to(torch.float32).contiguous()
    # The norms that a thinning needs again are kept, others are taken on the way when a tile is read once anyway.
    inline = few and not normalized and not given
    capacity = capacity_of(k)
    select = 512 if capacity < 1024 else 1024

    def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_empty(shape, dtype=dtype)

    unit = workspace(total, width, dtype=x.dtype)
    factor, scale, margin, bound = (workspace(total) for _ in range(4))
    inverse = workspace(total, dtype=torch.float64)
    appended, flagged = (workspace(total, dtype=torch.int32) for _ in range(2))
    buffer = workspace(total, capacity, dtype=torch.int64)
    weight = scores if inline else workspace(searches, rows)
    if valid is None:
        mask, mask_strides = scores, (0, 0, 0)
    else:
        mask = valid.view(torch.uint8)
        mask_strides = (valid.stride(0), valid.stride(1) if valid.dim() == 3 else 0, valid.stride(-1))
    groups = query_group is not None and row_group is not None
    own = query_group.contiguous() if query_group is not None else indices
    of_row = row_group.contiguous() if row_group is not None else indices
    block = exact_block(width)
    # A row in bfloat16 or float16 is scanned as it is; TF32 cuts the row and the query to ten bits.
    tf32 = x.dtype == torch.float32
    relative = 1.01 * 2.0**-24 * (4 * width + 32)
    form = {"NORMALIZED": normalized, "GIVEN": given}
    filters = {"VALID": valid is not None, "GROUPS": groups}
    pairs = (mask, *mask_strides, own, of_row)
    exact = (q, q.stride(0), q.stride(1), factor, inverse, x, x.stride(0), x.stride(1), norms)
    with on_device(queries):
        _scan.prepare_queries[(total,)](
            q, q.stride(0), q.stride(1), count, width, unit, factor, inverse, scale, margin, bound, appended, flagged,
            min_score, relative, NORMALIZED=normalized, BLOCK=block, ROUND=2.0**-9 * 1.01 if tf32 else 0.0,
            num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
        if not inline:
            _scan.prepare_rows[(triton.cdiv(rows, 16), searches)](
                x, x.stride(0), x.stride(1), rows, width, weight,
                LENGTHS=normalized or given, ROWS=16, BLOCK=min(128, block), num_warps=4, **ALL_REGISTERS,
            )  # fmt: skip
        tiles = triton.cdiv(rows, block_n)
        step = coprime_step(tiles)
        plan = rounds_of(tiles, block_n, k)
        for first, size in plan:
            _scan.scan[(triton.cdiv(count, block_q), size, searches)](
                unit, x, x.stride(0), x.stride(1), weight, norms, margin, bound, buffer, appended,
                *pairs, count, rows, width, tiles, first, step, capacity,
                INLINE=inline, PRECISION="tf32", BLOCK_N=block_n, BLOCK_Q=block_q, BLOCK_D=block_d, **form, **filters,
                num_warps=warps, num_stages=stages, **ALL_REGISTERS,
            )  # fmt: skip
            if rows > capacity:
                _scan.tighten[(total,)](
                    buffer, appended, flagged, bound, margin, weight, norms, count, rows, max(k, 8), capacity,
                    BLOCK=select, **form, num_warps=4, **ALL_REGISTERS,
                )  # fmt: skip
        _scan.rescore[(total, triton.cdiv(min(capacity, rows), EXACT_ROWS))](
            buffer, appended, flagged, *exact, count, rows, width, capacity, min_score,
            ROWS=EXACT_ROWS, BLOCK=block, **form, num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
        _scan.rescue[(total,)](
            buffer, appended, flagged, *exact, *pairs, count, rows, width, k, capacity, min_score,
            ROWS=EXACT_ROWS, BLOCK=block, BLOCK_KEYS=select, **form, **filters,
            num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
        _scan.finish[(total,)](
            buffer, appended, scores, indices, k, capacity,
            K=max(2, triton.next_power_of_2(k)), BLOCK=select, num_warps=4 if k <= 512 else 8,
            **ALL_REGISTERS,
        )  # fmt: skip
    return scores, indices


def cosine_topk_bwd(
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    inverse_norms: Tensor | None,
    normalized: bool,
    need_queries: bool,
    need_database: bool,
) -> tuple[Tensor, Tensor]:
    searches, count, width = queries.shape
    rows, k = database.shape[1], indices.shape[2]
    total, places = searches * count, count * k
    d_queries = queries.new_empty((searches, count, width) if need_queries else (0,))
    shape = (searches, rows, width) if need_database else (0,)
    d_database = torch.zeros(shape, dtype=database.dtype, device=database.device)
    if total == 0 or width == 0:
        return d_queries, d_database
    q, x, at = queries.contiguous(), database.contiguous(), indices.contiguous()
    g = grad.to(torch.float32).contiguous()
    row_in_query, query_in_query, query_in_row, row_in_row = (torch.empty_like(g) for _ in range(4))
    norms = g if inverse_norms is None else inverse_norms.to(torch.float32).contiguous()
    block = exact_block(width)
    wide = min(1024, triton.next_power_of_2(width))
    with on_device(queries):
        _backward.coefficients[(total, triton.cdiv(k, EXACT_ROWS))](
            g, q, x, at, norms, count, rows, width, k, row_in_query, query_in_query, query_in_row, row_in_row,
            NORMALIZED=normalized, GIVEN=inverse_norms is not None, ROWS=EXACT_ROWS, BLOCK=min(128, block),
            num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
        if need_queries:
            _backward.query_gradient[(total, triton.cdiv(width, wide))](
                q, x, at, row_in_query, query_in_query, d_queries, count, rows, width, k,
                BLOCK=wide, num_warps=4, **ALL_REGISTERS,
            )  # fmt: skip
        if need_database:
            in_order, order = at.view(searches, places).sort(dim=1, stable=True)
            _backward.row_gradient[(searches * places, triton.cdiv(width, wide))](
                q, x, in_order, order, query_in_row, row_in_row, d_database, count, rows, width, k, places,
                BLOCK=wide, num_warps=4, **ALL_REGISTERS,
            )  # fmt: skip
    return d_queries, d_database


def _norms_grid(database: Tensor) -> tuple[int, int, int]:
    searches, rows, width = database.shape
    return searches * rows, width, exact_block(width)


def inverse_norms_fwd(database: Tensor) -> Tensor:
    x = database.contiguous()
    rows, width, block = _norms_grid(x)
    out = x.new_empty(x.shape[:2], dtype=torch.float32)
    if rows:
        with on_device(x):
            _backward.norms_forward[(triton.cdiv(rows, EXACT_ROWS),)](
                x, out, rows, width, ROWS=EXACT_ROWS, BLOCK=block, num_warps=4, **ALL_REGISTERS
            )
    return out


def inverse_norms_bwd(grad: Tensor, database: Tensor) -> Tensor:
    x, g = database.contiguous(), grad.to(torch.float32).contiguous()
    rows, width, block = _norms_grid(x)
    out = torch.empty_like(x)
    if out.numel():
        with on_device(x):
            _backward.norms_backward[(triton.cdiv(rows, EXACT_ROWS),)](
                g, x, out, rows, width, ROWS=EXACT_ROWS, BLOCK=min(64, block), num_warps=4, **ALL_REGISTERS
            )
    return out
