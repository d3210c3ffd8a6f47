"""The links: their update, and the directional weights they give."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import ALL_REGISTERS, on_device
from .. import backward, forward
from .._device import optional, partial_sum
from .._launch import link_tiles
from ..backward import precedence_bwd
from .rows import row_options


def update_links_fwd(links: Tensor, precedence: Tensor, write_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::update_links_fwd``: one pass over the links."""
    links, precedence, write_weights = links.contiguous(), precedence.contiguous(), write_weights.contiguous()
    new_links, new_precedence = torch.empty_like(links), torch.empty_like(precedence)
    with on_device(links):
        forward.update_links(links, precedence, write_weights, None, None, new_links, new_precedence)
    return new_links, new_precedence


@triton.jit
def _precedence_bwd(
    grad, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, d_write_weights, N, blocks,
    HAS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    slope = precedence_bwd(
        grad, precedence, write_weights, d_rows, d_columns, d_before, d_precedence, plane, blocks, n, ok, N, HAS
    )
    tl.store(d_write_weights + plane * N + n, slope, mask=ok)


def update_links_bwd(
    d_links: Tensor | None,
    d_precedence: Tensor | None,
    links: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``memkern::update_links_bwd``: one pass over the links and their gradient, and one over its sums."""
    links, precedence, write_weights = links.contiguous(), precedence.contiguous(), write_weights.contiguous()
    d_links = None if d_links is None else d_links.contiguous()
    d_precedence = None if d_precedence is None else d_precedence.contiguous()
    batch, heads, slots = precedence.shape
    made, d_weights = torch.empty_like(precedence), torch.empty_like(write_weights)
    with on_device(links):
        d_old, _, _, d_rows, d_columns, d_before, blocks = backward.links_bwd(
            d_links, links, precedence, write_weights, None, None, None, None
        )
        _precedence_bwd[(batch * heads,)](
            precedence if d_precedence is None else d_precedence, precedence, write_weights, d_rows, d_columns,
            d_before, made, d_weights, slots, blocks, HAS=d_precedence is not None, NB=triton.next_power_of_2(slots),
            **row_options(slots),
        )  # fmt: skip
    return d_old, made, d_weights


@triton.jit
def _add_blocks(partials, out, N, blocks, R: tl.constexpr, NB: tl.constexpr):
    """(planes, blocks, R, N) -> (planes, R, N)."""
    plane = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    for r in range(R):
        tl.store(out + (plane * R + r) * N + n, partial_sum(partials, plane, blocks, r, n, ok, N, R), mask=ok)


def directional_weights_fwd(links: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::directional_weights_fwd``: one pass over the links, and the sum of its blocks."""
    links, read_weights = links.contiguous(), read_weights.contiguous()
    (batch, heads, slots, _), read_heads = links.shape, read_weights.shape[1]
    with on_device(links):
        ahead, partials, blocks = forward.multiply_links(links, read_weights)
        back = torch.empty_like(ahead)
        _add_blocks[(batch * heads,)](
            partials, back, slots, blocks, R=read_heads, NB=triton.next_power_of_2(slots), **row_options(slots)
        )
    return ahead, back


@triton.jit
def _directional_bwd(
    d_ahead, d_back, links, read_weights, d_links, x, y, N,
    H: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, HAS_AHEAD: tl.constexpr, HAS_BACK: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """d_links = d_ahead r^T + r d_back^T; x = L d_back along rows, y = L^T d_ahead along columns, in blocks."""
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = plane // H
    i = block * BI + tl.arange(0, BI)
    row_ok = i < N
    r = tl.arange(0, RB)
    row_lanes = row_ok[:, None] & (r < R)[None, :]
    ahead_i = optional(d_ahead, (plane * R + r)[None, :] * N + i[:, None], row_lanes, HAS_AHEAD)
    across = tl.zeros((BI, RB), tl.float32)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        column_ok = j < N
        ok = row_ok[:, None] & column_ok[None, :]
        lanes = column_ok[:, None] & (r < R)[None, :]
        at = plane * N * N + i.to(tl.int64)[:, None] * N + j[None, :]
        link = tl.load(links + at, mask=ok, other=0.0)
        back_j = optional(d_back, (plane * R + r)[None, :] * N + j[:, None], lanes, HAS_BACK)
        across += tl.sum(link[:, :, None] * back_j[None, :, :], axis=1)
        to = ((plane * tl.num_programs(0) + block) * R + r)[None, :] * N + j[:, None]
        tl.store(y + to, tl.sum(link[:, :, None] * ahead_i[:, None, :], axis=0), mask=lanes)
        slope = tl.zeros((BI, BJ), tl.float32)
        for k in tl.static_range(R):
            read = read_weights + (b * R + k) * N
            line = (plane * R + k) * N
            r_i = tl.load(read + i, mask=row_ok, other=0.0)
            r_j = tl.load(read + j, mask=column_ok, other=0.0)
            slope += optional(d_ahead, line + i, row_ok, HAS_AHEAD)[:, None] * r_j[None, :]
            slope += r_i[:, None] * optional(d_back, line + j, column_ok, HAS_BACK)[None, :]
        tl.store(d_links + at, slope, mask=ok)
    tl.store(x + (plane * R + r)[None, :] * N + i[:, None], across, mask=row_lanes)


@triton.jit
def _directional_reads_bwd(x, y, d_read_weights, N, blocks, H: tl.constexpr, R: tl.constexpr, NB: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    for r in range(R):
        total = tl.zeros((NB,), tl.float32)
        for h in range(H):
            plane = b * H + h
            total += tl.load(x + (plane * R + r) * N + n, mask=ok, other=0.0)
            total += partial_sum(y, plane, blocks, r, n, ok, N, R)
        tl.store(d_read_weights + (b * R + r) * N + n, total, mask=ok)


def directional_weights_bwd(
    d_forward: Tensor | None, d_backward: Tensor | None, links: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::directional_weights_bwd``."""
    links, read_weights = links.contiguous(), read_weights.contiguous()
    ahead = None if d_forward is None else d_forward.contiguous()
    back = None if d_backward is None else d_backward.contiguous()
    (batch, heads, slots, _), read_heads = links.shape, read_weights.shape[1]
    block_i, block_j = link_tiles(slots, 2 * read_heads)
    blocks = triton.cdiv(slots, block_i)
    d_links, d_read = torch.empty_like(links), torch.empty_like(read_weights)
    x = torch.empty((batch, heads, read_heads, slots), dtype=torch.float32, device=links.device)
    y = torch.empty((batch, heads, blocks, read_heads, slots), dtype=torch.float32, device=links.device)
    with on_device(links):
        _directional_bwd[(blocks, batch * heads)](
            links if ahead is None else ahead, links if back is None else back, links, read_weights, d_links, x, y,
            slots, H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), HAS_AHEAD=ahead is not None,
            HAS_BACK=back is not None, BI=block_i, BJ=block_j, num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
        _directional_reads_bwd[(batch,)](
            x, y, d_read, slots, blocks, H=heads, R=read_heads, NB=triton.next_power_of_2(slots), **row_options(slots)
        )
    return d_links, d_read
