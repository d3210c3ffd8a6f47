"""Back through the links: one pass over them and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import ALL_REGISTERS
from .._device import optional, partial_sum
from .._launch import link_tiles


@triton.jit
def _links_bwd(
    d_new_links, links, precedence, write_weights, read_weights, d_mixed, modes, step_mask,
    d_links, x, y, d_rows, d_columns, d_before, N,
    H: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, HAS_LINKS: tl.constexpr, READ: tl.constexpr,
    HAS_MASK: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head. ``write_weights`` are the new ones, ``read_weights`` the previous.

    ``x`` (B, H, R, N) and ``d_rows`` (B, H, N) are sums along rows; ``y`` (B, H, blocks, R, N), ``d_columns`` and
    ``d_before`` (B, H, blocks, N) partials of sums along columns.
    """
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = plane // H, plane % H
    live = tl.full((), 1, tl.int1)
    if HAS_MASK:
        live = tl.load(step_mask + b) != 0
    i = block * BI + tl.arange(0, BI)
    row_ok = i < N
    r = tl.arange(0, RB)
    w_i = tl.load(write_weights + plane * N + i, mask=row_ok, other=0.0)
    along_rows = tl.zeros((BI,), tl.float32)
    across = tl.zeros((BI, RB), tl.float32)
    slope_i = tl.zeros((BI, RB), tl.float32)
    if READ:
        slope_i = tl.load(
            d_mixed + (b * R + r)[None, :] * N + i[:, None], mask=row_ok[:, None] & (r < R)[None, :], other=0.0
        )
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        column_ok = j < N
        ok = row_ok[:, None] & column_ok[None, :]
        at = plane * N * N + i.to(tl.int64)[:, None] * N + j[None, :]
        old = tl.load(links + at, mask=ok, other=0.0)
        given = optional(d_new_links, at, ok, HAS_LINKS)
        w_j = tl.load(write_weights + plane * N + j, mask=column_ok, other=0.0)
        p_j = tl.load(precedence + plane * N + j, mask=column_ok, other=0.0)
        off = i[:, None] != j[None, :]
        factor = 1.0 - w_i[:, None] - w_j[None, :]
        passes = off & ~(factor < 0.0)
        kept = tl.where(passes, factor, 0.0)
        d_new = given
        if READ:
            new = tl.where(off, kept * old + w_i[:, None] * p_j[None, :], 0.0)
            slope_j = tl.load(
                d_mixed + (b * R + r)[:, None] * N + j[None, :], mask=(r < R)[:, None] & column_ok[None, :], other=0.0
            )
            across += tl.sum(new[:, :, None] * tl.trans(slope_j)[None, :, :], axis=1)
            to = ((plane * tl.num_programs(0) + block) * R + r)[None, :] * N + j[:, None]
            tl.store(
                y + to,
                tl.sum(new[:, :, None] * slope_i[:, None, :], axis=0),
                mask=column_ok[:, None] & (r < R)[None, :],
            )
            for k in tl.static_range(R):
                mode = modes + (b * R + k) * (1 + 2 * H)
                rows, columns = d_mixed + (b * R + k) * N, read_weights + (b * R + k) * N
                s_i = tl.load(rows + i, mask=row_ok, other=0.0)
                s_j = tl.load(rows + j, mask=column_ok, other=0.0)
                r_i = tl.load(columns + i, mask=row_ok, other=0.0)
                r_j = tl.load(columns + j, mask=column_ok, other=0.0)
                ahead, back = tl.load(mode + H + 1 + h), tl.load(mode + h)
                d_new += (ahead * s_i)[:, None] * r_j[None, :] + (back * r_i)[:, None] * s_j[None, :]
        d_new = tl.where(off, d_new, 0.0)
        tl.store(d_links + at, tl.where(live, kept * d_new, given), mask=ok)
        lost = tl.where(passes, old * d_new, 0.0)
        along_rows += tl.sum(p_j[None, :] * d_new - lost, axis=1)
        to = (plane * tl.num_programs(0) + block) * N + j
        tl.store(d_columns + to, -tl.sum(lost, axis=0), mask=column_ok)
        tl.store(d_before + to, tl.sum(w_i[:, None] * d_new, axis=0), mask=column_ok)
    tl.store(d_rows + plane * N + i, along_rows, mask=row_ok)
    if READ:
        tl.store(x + (plane * R + r)[None, :] * N + i[:, None], across, mask=row_ok[:, None] & (r < R)[None, :])


def links_bwd(
    d_new_links: Tensor | None,
    links: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor | None,
    d_mixed: Tensor | None,
    modes: Tensor | None,
    step_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Second launch; without ``read_weights`` only the update, not the reads.

    Returns:
        d_links, x, y, d_rows, d_columns, d_before, and the number of row blocks.
    """
    batch, heads, slots, _ = links.shape
    read_heads = 1 if read_weights is None else read_weights.shape[1]
    block_i, block_j = link_tiles(slots, 2 * read_heads)
    blocks = triton.cdiv(slots, block_i)

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape, slots), dtype=torch.float32, device=links.device)

    d_links, d_rows, d_columns, d_before = empty(slots), empty(), empty(blocks), empty(blocks)
    x, y = (links, links) if read_weights is None else (empty(read_heads), empty(blocks, read_heads))
    _links_bwd[(blocks, batch * heads)](
        links if d_new_links is None else d_new_links, links, precedence, write_weights,
        links if read_weights is None else read_weights, links if d_mixed is None else d_mixed,
        links if modes is None else modes, links if step_mask is None else step_mask,
        d_links, x, y, d_rows, d_columns, d_before, slots,
        H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), HAS_LINKS=d_new_links is not None,
        READ=read_weights is not None, HAS_MASK=step_mask is not None, BI=block_i, BJ=block_j,
        num_warps=4, **ALL_REGISTERS,
    )  # fmt: skip
    return d_links, x, y, d_rows, d_columns, d_before, blocks


@triton.jit
def precedence_bwd(
    d_new_precedence, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, plane, blocks, n, ok, N,
    HAS: tl.constexpr,
):  # fmt: skip
    """Gradient of the previous precedence, stored; of the new write weights through links and precedence, returned."""
    at = plane * N + n
    slope = tl.load(d_rows + at, mask=ok, other=0.0) + partial_sum(d_columns, plane, blocks, 0, n, ok, N, 1)
    d_p = partial_sum(d_before, plane, blocks, 0, n, ok, N, 1)
    if HAS:
        g = tl.load(d_new_precedence + at, mask=ok, other=0.0)
        total = tl.sum(tl.load(write_weights + at, mask=ok, other=0.0), axis=0)
        passes = ~(total > 1.0)
        d_p += tl.where(passes, 1.0 - total, 0.0) * g
        p = tl.load(precedence + at, mask=ok, other=0.0)
        slope += g - tl.where(passes, tl.sum(g * p, axis=0), 0.0)
    tl.store(d_precedence + at, d_p, mask=ok)
    return slope
