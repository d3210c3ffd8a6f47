"""One step of the memory, forward: three launches, and one pass over the links.

The first has the usage, the write lookup, the allocation and the write weights of a batch item; the second updates the
links block by block and, while a block is in registers, sums it along its rows and its columns for the directional
reads; the third writes the memory, looks it up, mixes and reads. Column sums meet as partials of the row blocks, which
are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import ALL_REGISTERS, on_device
from ._device import (
    NORM_EPS,
    USAGE_EPS,
    key_factors,
    logs_before,
    partial_sum,
    retention,
    rewritten,
    sharpened,
    softmax,
    written,
)
from ._launch import EXACT, link_tiles, tiles, warps


@triton.jit
def lookup(
    memory, keys, factors, scores, read_weights, free_gates, b, N, W,
    H: tl.constexpr, HB: tl.constexpr, R: tl.constexpr, DEALLOCATE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """strength times cosine of every key and slot of batch item ``b``, to ``scores`` (B, H, N)."""
    h = tl.arange(0, HB)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, HB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            m = tl.load(memory + (b * N + n)[:, None] * W + w[None, :], mask=ok[:, None] & (w < W)[None, :], other=0.0)
            if DEALLOCATE:
                m = m * retention(read_weights, free_gates, b, n, ok, N, R)[:, None]
            squares += tl.sum(m * m, axis=1)
            for i in tl.static_range(H):
                k = tl.load(keys + (b * H + i) * W + w, mask=w < W, other=0.0)
                dots += tl.where((h == i)[None, :], tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
        score = dots * factors[None, :] / tl.sqrt(squares + NORM_EPS)[:, None]
        tl.store(scores + (b * H + h)[None, :] * N + n[:, None], score, mask=ok[:, None] & (h < H)[None, :])


@triton.jit
def _write_weights(
    memory, usage, read_weights, write_weights, keys, strengths, free_gates, allocation_gates, write_gates, step_mask,
    new_usage, content, allocation, new_write_weights, scratch, N, W,
    R: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, TRACK_USAGE: tl.constexpr, DEALLOCATE: tl.constexpr,
    HAS_MASK: tl.constexpr, NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NB)
    ok = n < N
    if HAS_MASK:  # noqa: SIM102 - decided when the kernel is compiled, and without a mask there is none to load
        if tl.load(step_mask + b) == 0:
            if TRACK_USAGE:
                tl.store(new_usage + b * N + n, tl.load(usage + b * N + n, mask=ok), mask=ok)
            for h in range(H):
                at = (b * H + h) * N + n
                tl.store(new_write_weights + at, tl.load(write_weights + at, mask=ok), mask=ok)
            return
    factors = key_factors(keys, strengths, b, W, H, HB, BW)
    lookup(
        memory, keys, factors, content, read_weights, free_gates, b, N, W, H, HB, R, DEALLOCATE, BN, BW
    )  # fmt: skip
    used = tl.zeros((NB,), tl.float32)
    if TRACK_USAGE:
        u = tl.load(usage + b * N + n, mask=ok, other=0.0)
        used = (u + written(write_weights, b, n, ok, N, H) * (1.0 - u)) * retention(
            read_weights, free_gates, b, n, ok, N, R
        )
        used = tl.where(used > 1.0, 1.0, tl.where(used < 0.0, 0.0, used))  # keeps a NaN
        tl.store(new_usage + b * N + n, used, mask=ok)
    tl.debug_barrier()
    for h in range(H):
        at = (b * H + h) * N + n
        found = softmax(tl.load(content + at, mask=ok, other=0.0), ok)
        tl.debug_barrier()  # a lane may be held by several threads, and none may read what another has replaced
        tl.store(content + at, found, mask=ok)
        gate = tl.load(write_gates + b * H + h)
        towards_free = tl.load(allocation_gates + b * H + h)
        if TRACK_USAGE:
            entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
            tl.store(scratch + b * N + n, entered, mask=ok)
            tl.debug_barrier()
            free = (1.0 - USAGE_EPS) * (1.0 - used) * tl.exp(logs_before(scratch + b * N, entered, n, N, NB, BJ))
            tl.debug_barrier()
            tl.store(allocation + at, free, mask=ok)
            used = used + (1.0 - used) * (gate * towards_free * free)
        else:
            free = tl.zeros((NB,), tl.float32) + 1.0 / N
        tl.store(new_write_weights + at, gate * (towards_free * free + (1.0 - towards_free) * found), mask=ok)


@triton.jit
def _links(
    links, precedence, write_weights, read_weights, step_mask, new_links, new_precedence, ahead, back, N,
    H: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, UPDATE: tl.constexpr, READ: tl.constexpr,
    HAS_MASK: tl.constexpr, NB: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A block of rows of the links of one head: updated, and multiplied by the read weights from both sides.

    ``ahead`` is (B, H, R, N), ``back`` (B, H, row blocks, R, N).
    """
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = plane // H
    live = tl.full((), 1, tl.int1)
    if HAS_MASK:
        live = tl.load(step_mask + b) != 0
    i = block * BI + tl.arange(0, BI)
    row_ok = i < N
    r = tl.arange(0, RB)
    w_i = tl.zeros((BI,), tl.float32)
    if UPDATE:
        w_i = tl.load(write_weights + plane * N + i, mask=row_ok, other=0.0)
        n = tl.arange(0, NB)
        total = tl.sum(tl.load(write_weights + plane * N + n, mask=n < N, other=0.0), axis=0)
        before = tl.load(precedence + plane * N + i, mask=row_ok, other=0.0)
        # Not the larger of the two: that would drop a NaN.
        follows = tl.where(total > 1.0, 0.0, 1.0 - total) * before + w_i
        tl.store(new_precedence + plane * N + i, tl.where(live, follows, before), mask=row_ok)
    r_i = tl.zeros((BI, RB), tl.float32)
    if READ:
        r_i = tl.load(
            read_weights + (b * R + r)[None, :] * N + i[:, None], mask=row_ok[:, None] & (r < R)[None, :], other=0.0
        )
    forward = tl.zeros((BI, RB), tl.float32)
    for start in range(0, N, BJ):
        j = start + tl.arange(0, BJ)
        column_ok = j < N
        ok = row_ok[:, None] & column_ok[None, :]
        at = plane * N * N + i.to(tl.int64)[:, None] * N + j[None, :]
        x = tl.load(links + at, mask=ok, other=0.0)
        if UPDATE:
            w_j = tl.load(write_weights + plane * N + j, mask=column_ok, other=0.0)
            p_j = tl.load(precedence + plane * N + j, mask=column_ok, other=0.0)
            kept = 1.0 - w_i[:, None] - w_j[None, :]
            updated = tl.where(kept < 0.0, 0.0, kept) * x + w_i[:, None] * p_j[None, :]
            x = tl.where(live, tl.where(i[:, None] == j[None, :], 0.0, updated), x)
            tl.store(new_links + at, x, mask=ok)
        if READ:
            r_j = tl.load(
                read_weights + (b * R + r)[:, None] * N + j[None, :],
                mask=(r < R)[:, None] & column_ok[None, :],
                other=0.0,
            )
            forward += tl.sum(x[:, :, None] * tl.trans(r_j)[None, :, :], axis=1)
            backward = tl.sum(x[:, :, None] * r_i[:, None, :], axis=0)
            to = ((plane * tl.num_programs(0) + block) * R + r)[None, :] * N + j[:, None]
            tl.store(back + to, backward, mask=column_ok[:, None] & (r < R)[None, :])
    if READ:
        to = (plane * R + r)[None, :] * N + i[:, None]
        tl.store(ahead + to, forward, mask=row_ok[:, None] & (r < R)[None, :])


@triton.jit
def _write(
    memory, write_weights, erase_vectors, write_vectors, read_weights, free_gates, step_mask, new_memory, N, W,
    R: tl.constexpr, H: tl.constexpr, DEALLOCATE: tl.constexpr, HAS_MASK: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The write alone, a block of slots a program: what recomputes a segment of a scan."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < N
    live = tl.full((), 1, tl.int1)
    if HAS_MASK:
        live = tl.load(step_mask + b) != 0
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        inside = ok[:, None] & (w < W)[None, :]
        at = (b * N + n)[:, None] * W + w[None, :]
        m = tl.load(memory + at, mask=inside, other=0.0)
        kept = m
        if DEALLOCATE:
            kept = m * retention(read_weights, free_gates, b, n, ok, N, R)[:, None]
        new = rewritten(kept, write_weights, erase_vectors, write_vectors, b, n, ok, w, N, W, H)
        tl.store(new_memory + at, tl.where(live, new, m), mask=inside)


@triton.jit
def _read(
    memory, read_weights, write_weights, keys, strengths, modes, erase_vectors, write_vectors, free_gates, sharpness,
    step_mask, ahead, back, reads, new_memory, content, mixed, new_read_weights, N, W, blocks,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, TRACK_LINKS: tl.constexpr, DEALLOCATE: tl.constexpr,
    SHARPEN: tl.constexpr, HAS_MASK: tl.constexpr,
    NB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    live = tl.full((), 1, tl.int1)
    if HAS_MASK:
        live = tl.load(step_mask + b) != 0
    r = tl.arange(0, RB)
    factors = key_factors(keys, strengths, b, W, R, RB, BW)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        ok = n < N
        squares = tl.zeros((BN,), tl.float32)
        dots = tl.zeros((BN, RB), tl.float32)
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            inside = ok[:, None] & (w < W)[None, :]
            at = (b * N + n)[:, None] * W + w[None, :]
            m = tl.load(memory + at, mask=inside, other=0.0)
            kept = m
            if DEALLOCATE:
                kept = m * retention(read_weights, free_gates, b, n, ok, N, R)[:, None]
            new = rewritten(kept, write_weights, erase_vectors, write_vectors, b, n, ok, w, N, W, H)
            m = tl.where(live, new, m)
            tl.store(new_memory + at, m, mask=inside)
            squares += tl.sum(m * m, axis=1)
            for i in tl.static_range(R):
                k = tl.load(keys + (b * R + i) * W + w, mask=w < W, other=0.0)
                dots += tl.where((r == i)[None, :], tl.sum(m * k[None, :], axis=1)[:, None], 0.0)
        score = dots * factors[None, :] / tl.sqrt(squares + NORM_EPS)[:, None]
        tl.store(content + (b * R + r)[None, :] * N + n[:, None], score, mask=ok[:, None] & (r < R)[None, :])
    tl.debug_barrier()
    n = tl.arange(0, NB)
    ok = n < N
    for head in range(R):
        at = (b * R + head) * N + n
        found = softmax(tl.load(content + at, mask=ok, other=0.0), ok)
        tl.debug_barrier()  # a lane may be held by several threads, and none may read what another has replaced
        tl.store(content + at, found, mask=ok)
        mode = modes + (b * R + head) * (1 + 2 * H)
        share = tl.load(mode + H)
        if TRACK_LINKS:
            weight = share * found
            for h in range(H):
                plane = b * H + h
                weight += tl.load(mode + h) * partial_sum(back, plane, blocks, head, n, ok, N, R)
                weight += tl.load(mode + H + 1 + h) * tl.load(ahead + (plane * R + head) * N + n, mask=ok, other=0.0)
        else:
            weight = tl.where(share == 0.0, 0.0, found)
        if SHARPEN:
            tl.store(mixed + at, weight, mask=ok)
            weight = sharpened(weight, tl.load(sharpness + b * R + head), ok)
        if HAS_MASK:
            weight = tl.where(live, weight, tl.load(read_weights + at, mask=ok, other=0.0))
        tl.store(new_read_weights + at, weight, mask=ok)
    tl.debug_barrier()
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        total = tl.zeros((RB, BW), tl.float32)
        for first in range(0, N, BN):
            n_block = first + tl.arange(0, BN)
            block_ok = n_block < N
            block = tl.load(
                new_memory + (b * N + n_block)[:, None] * W + w[None, :],
                mask=block_ok[:, None] & (w < W)[None, :],
                other=0.0,
            )
            for i in tl.static_range(R):
                part = tl.load(new_read_weights + (b * R + i) * N + n_block, mask=block_ok, other=0.0)
                total += tl.where((r == i)[:, None], tl.sum(part[:, None] * block, axis=0)[None, :], 0.0)
        total = tl.where(live, total, 0.0)
        tl.store(reads + (b * R + r)[:, None] * W + w[None, :], total, mask=(r < R)[:, None] & (w < W)[None, :])


def write_weights(
    memory: Tensor,
    usage: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    said: dict[str, Tensor],
    step_mask: Tensor | None,
    track_usage: bool,
    deallocate: bool,
    new_usage: Tensor,
    content: Tensor,
    allocation: Tensor,
    new_write_weights: Tensor,
) -> None:
    """First launch of a step."""
    batch, slots, width = memory.shape
    read_heads, heads = read_weights.shape[1], write_weights.shape[1]
    tile = tiles(slots, width, heads)
    scratch = torch.empty((batch, slots) if track_usage else (1,), dtype=torch.float32, device=memory.device)
    _write_weights[(batch,)](
        memory, usage, read_weights, write_weights, said["write_keys"], said["write_strengths"], said["free_gates"],
        said["allocation_gates"], said["write_gates"], memory if step_mask is None else step_mask,
        new_usage, content, allocation, new_write_weights, scratch, slots, width,
        R=read_heads, H=heads, HB=triton.next_power_of_2(heads), TRACK_USAGE=track_usage, DEALLOCATE=deallocate,
        HAS_MASK=step_mask is not None, **tile, BJ=max(1, min(64, 8192 // tile["NB"])),
        num_warps=warps(slots, width), **EXACT,
    )  # fmt: skip


def update_links(
    links: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor | None,
    step_mask: Tensor | None,
    new_links: Tensor,
    new_precedence: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """Second launch of a step: the new links, and their products with ``read_weights`` when there are some.

    Returns:
        (B, H, R, N) forward reads, (B, H, blocks, R, N) partials of the backward reads, and the number of blocks.
    """
    batch, heads, slots, _ = links.shape
    read_heads = 1 if read_weights is None else read_weights.shape[1]
    block_i, block_j = link_tiles(slots, read_heads)
    blocks = triton.cdiv(slots, block_i)
    made = read_weights is not None
    ahead = torch.empty((batch, heads, read_heads, slots) if made else (0,), dtype=links.dtype, device=links.device)
    back = torch.empty(
        (batch, heads, blocks, read_heads, slots) if made else (0,), dtype=links.dtype, device=links.device
    )
    _links[(blocks, batch * heads)](
        links, precedence, write_weights, links if read_weights is None else read_weights,
        links if step_mask is None else step_mask, new_links, new_precedence, ahead, back, slots,
        H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), UPDATE=True, READ=made,
        HAS_MASK=step_mask is not None, NB=triton.next_power_of_2(slots), BI=block_i, BJ=block_j, num_warps=4,
        **ALL_REGISTERS,
    )  # fmt: skip
    return ahead, back, blocks


def multiply_links(links: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor, int]:
    """The links as they are, multiplied from both sides; results as :func:`update_links`."""
    batch, heads, slots, _ = links.shape
    read_heads = read_weights.shape[1]
    block_i, block_j = link_tiles(slots, read_heads)
    blocks = triton.cdiv(slots, block_i)
    ahead = torch.empty((batch, heads, read_heads, slots), dtype=torch.float32, device=links.device)
    back = torch.empty((batch, heads, blocks, read_heads, slots), dtype=torch.float32, device=links.device)
    _links[(blocks, batch * heads)](
        links, links, links, read_weights, links, links, links, ahead, back, slots,
        H=heads, R=read_heads, RB=triton.next_power_of_2(read_heads), UPDATE=False, READ=True, HAS_MASK=False,
        NB=triton.next_power_of_2(slots), BI=block_i, BJ=block_j, num_warps=4, **ALL_REGISTERS,
    )  # fmt: skip
    return ahead, back, blocks


def write_memory(
    memory: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    said: dict[str, Tensor],
    step_mask: Tensor | None,
    deallocate: bool,
    new_memory: Tensor,
) -> None:
    """The write of a step alone."""
    batch, slots, width = memory.shape
    tile = tiles(slots, width)
    _write[(triton.cdiv(slots, tile["BN"]), batch)](
        memory, write_weights, said["erase_vectors"], said["write_vectors"], read_weights, said["free_gates"],
        memory if step_mask is None else step_mask, new_memory, slots, width,
        R=read_weights.shape[1], H=write_weights.shape[1], DEALLOCATE=deallocate, HAS_MASK=step_mask is not None,
        BN=tile["BN"], BW=tile["BW"], num_warps=4, **ALL_REGISTERS,
    )  # fmt: skip


def step(
    old: dict[str, Tensor],
    said: dict[str, Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    new: dict[str, Tensor],
) -> None:
    """One step on contiguous tensors, into the tensors of ``new``: those of the state, ``reads`` and what is saved."""
    memory, read_weights = old["memory"], old["read_weights"]
    batch, slots, width = memory.shape
    read_heads, heads = read_weights.shape[1], old["write_weights"].shape[1]
    with on_device(memory):
        write_weights(
            memory, old["usage"], read_weights, old["write_weights"], said, step_mask, track_usage, deallocate,
            new["usage"], new["write_content"], new["allocation"], new["write_weights"],
        )  # fmt: skip
        ahead, back, blocks = memory, memory, 0
        if track_links:
            ahead, back, blocks = update_links(
                old["links"], old["precedence"], new["write_weights"], read_weights, step_mask, new["links"],
                new["precedence"],
            )  # fmt: skip
        tile = tiles(slots, width, heads)
        _read[(batch,)](
            memory, read_weights, new["write_weights"], said["read_keys"], said["read_strengths"], said["read_modes"],
            said["erase_vectors"], said["write_vectors"], said["free_gates"],
            memory if sharpness is None else sharpness, memory if step_mask is None else step_mask, ahead, back,
            new["reads"], new["memory"], new["read_content"], new["mixed"], new["read_weights"], slots, width, blocks,
            R=read_heads, RB=triton.next_power_of_2(read_heads), H=heads, TRACK_LINKS=track_links,
            DEALLOCATE=deallocate, SHARPEN=sharpness is not None, HAS_MASK=step_mask is not None, **tile,
            num_warps=warps(slots, width), **ALL_REGISTERS,
        )  # fmt: skip


def outputs(
    old: dict[str, Tensor], width: int, sharpness: Tensor | None, track_usage: bool, track_links: bool
) -> dict[str, Tensor]:
    """Uninitialised tensors for what one step makes; empty for what it does not."""
    batch, heads, slots = old["write_weights"].shape
    read_heads = old["read_weights"].shape[1]

    def empty(*shape: int, there: bool = True) -> Tensor:
        return torch.empty(shape if there else (0,), dtype=torch.float32, device=old["memory"].device)

    return {
        "reads": empty(batch, read_heads, width),
        "memory": empty(batch, slots, width),
        "usage": empty(batch, slots, there=track_usage),
        "links": empty(batch, heads, slots, slots, there=track_links),
        "precedence": empty(batch, heads, slots, there=track_links),
        "read_weights": empty(batch, read_heads, slots),
        "write_weights": empty(batch, heads, slots),
        "write_content": empty(batch, heads, slots),
        "allocation": empty(batch, heads, slots, there=track_usage),
        "read_content": empty(batch, read_heads, slots),
        "mixed": empty(batch, read_heads, slots, there=sharpness is not None),
    }
