"""The scan of a small memory in one launch: a program per batch item keeps memory and links on the chip for all steps.

Each step is that of :mod:`.forward`, term by term, without its passes through global memory; what backward needs goes
to the same histories and snapshots as those of the host loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._common import on_device
from ._device import NORM_EPS, USAGE_EPS, sharpened, softmax
from ._launch import EXACT, INTERFACE, STATE

LIMIT = 4096
"""Elements of memory, and of links, that a program can keep; with several write heads half of it."""


@triton.jit
def _row(rows, index, i):
    """Row ``i`` of a matrix in registers."""
    return tl.sum(tl.where((index == i)[:, None], rows, 0.0), axis=0)


@triton.jit
def _plane(planes, index, i):
    """Plane ``i`` of a stack of matrices in registers."""
    return tl.sum(tl.where((index == i)[:, None, None], planes, 0.0), axis=0)


@triton.jit
def _key(keys, row, w, W):
    """A key and its length."""
    k = tl.load(keys + row * W + w, mask=w < W, other=0.0)
    return k, tl.sqrt(tl.sum(k * k, axis=0) + NORM_EPS)


@triton.jit
def _scan(
    memory, usage, links, precedence, read_weights, write_weights,
    read_keys, read_strengths, modes, write_keys, write_strengths, write_vectors, erase_vectors,
    free_gates, allocation_gates, write_gates, sharpness, step_mask,
    reads, new_memory, new_usage, new_links, new_precedence, new_read_weights, new_write_weights,
    kept_write_content, kept_allocation, kept_read_content, kept_mixed, kept_usage, kept_read, kept_write,
    saved_memory, saved_links, saved_precedence, batch, steps, N, W, every,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, TRACK_USAGE: tl.constexpr,
    TRACK_LINKS: tl.constexpr, DEALLOCATE: tl.constexpr, SHARPEN: tl.constexpr, HAS_MASK: tl.constexpr,
    SAVE: tl.constexpr, NB: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, w, r, h = tl.arange(0, NB), tl.arange(0, WB), tl.arange(0, RB), tl.arange(0, HB)
    ok = n < N
    cell, cell_ok = n[:, None] * W + w[None, :], ok[:, None] & (w < W)[None, :]
    read_lane, read_ok = r[:, None] * N + n[None, :], (r < R)[:, None] & ok[None, :]
    write_lane, write_ok = h[:, None] * N + n[None, :], (h < H)[:, None] & ok[None, :]
    link = h[:, None, None] * N * N + n[None, :, None] * N + n[None, None, :]
    link_ok = (h < H)[:, None, None] & ok[None, :, None] & ok[None, None, :]
    m = tl.load(memory + b * N * W + cell, mask=cell_ok, other=0.0)
    r_w = tl.load(read_weights + b * R * N + read_lane, mask=read_ok, other=0.0)
    w_w = tl.load(write_weights + b * H * N + write_lane, mask=write_ok, other=0.0)
    u = tl.zeros((NB,), tl.float32)
    if TRACK_USAGE:
        u = tl.load(usage + b * N + n, mask=ok, other=0.0)
    if TRACK_LINKS:
        x = tl.load(links + b * H * N * N + link, mask=link_ok, other=0.0)
        p = tl.load(precedence + b * H * N + write_lane, mask=write_ok, other=0.0)
    for t in range(steps):
        if SAVE:  # noqa: SIM102 - decided when the kernel is compiled
            if (t % every == 0) & (t > 0):
                shot = (t // every - 1) * batch + b
                tl.store(saved_memory + shot * N * W + cell, m, mask=cell_ok)
                if TRACK_LINKS:
                    tl.store(saved_links + shot * H * N * N + link, x, mask=link_ok)
                    tl.store(saved_precedence + shot * H * N + write_lane, p, mask=write_ok)
        live = tl.full((), 1, tl.int1)
        if HAS_MASK:
            live = tl.load(step_mask + b * steps + t) != 0
        now, then = b * steps + t, t * batch + b
        psi = tl.where(ok, 1.0, 0.0)
        for i in range(R):
            psi = psi * (1.0 - tl.load(free_gates + now * R + i) * _row(r_w, r, i))
        kept = m
        if DEALLOCATE:
            kept = m * psi[:, None]
        used = tl.zeros((NB,), tl.float32)
        new_u = u
        if TRACK_USAGE:
            wrote = tl.zeros((NB,), tl.float32)
            for i in range(H):
                wrote = wrote + _row(w_w, h, i) * (1.0 - wrote)
            used = (u + wrote * (1.0 - u)) * psi
            used = tl.where(used > 1.0, 1.0, tl.where(used < 0.0, 0.0, used))  # keeps a NaN
            new_u = used
        # The write: each head allocates on what the ones before it have taken.
        length = tl.sqrt(tl.sum(kept * kept, axis=1) + NORM_EPS)
        new = kept
        added = tl.zeros((NB, WB), tl.float32)
        new_w = w_w
        for i in range(H):
            row = now * H + i
            k, size = _key(write_keys, row, w, W)
            factor = tl.load(write_strengths + row) / size
            found = softmax(tl.sum(kept * k[None, :], axis=1) * factor / length, ok)
            gate, towards_free = tl.load(write_gates + row), tl.load(allocation_gates + row)
            if TRACK_USAGE:
                entered = USAGE_EPS + (1.0 - USAGE_EPS) * used
                before = (entered[None, :] < entered[:, None]) | (
                    (entered[None, :] == entered[:, None]) & (n[None, :] < n[:, None])
                )
                logs = tl.sum(tl.where(before & ok[None, :], tl.log(entered)[None, :], 0.0), axis=1)
                free = (1.0 - USAGE_EPS) * (1.0 - used) * tl.exp(logs)
                used = used + (1.0 - used) * (gate * towards_free * free)
                if SAVE:
                    tl.store(kept_allocation + (then * H + i) * N + n, free, mask=ok)
            else:
                free = tl.zeros((NB,), tl.float32) + 1.0 / N
            weight = tl.where(ok, gate * (towards_free * free + (1.0 - towards_free) * found), 0.0)
            new_w = tl.where((h == i)[:, None], weight[None, :], new_w)
            erase = tl.load(erase_vectors + row * W + w, mask=w < W, other=0.0)
            add = tl.load(write_vectors + row * W + w, mask=w < W, other=0.0)
            new = new * (1.0 - weight[:, None] * erase[None, :])
            added += weight[:, None] * add[None, :]
            if SAVE:
                tl.store(kept_write_content + (then * H + i) * N + n, found, mask=ok)
        m = tl.where(live, new + added, m)
        u = tl.where(live, new_u, u)
        w_w = tl.where(live, new_w, w_w)
        if TRACK_LINKS:
            for i in range(H):
                weight, was, old = _row(w_w, h, i), _row(p, h, i), _plane(x, h, i)
                factor = 1.0 - weight[:, None] - weight[None, :]
                updated = tl.where(factor < 0.0, 0.0, factor) * old + weight[:, None] * was[None, :]
                updated = tl.where(n[:, None] == n[None, :], 0.0, updated)
                total = tl.sum(weight, axis=0)
                # Not the larger of the two: that would drop a NaN.
                follows = tl.where(total > 1.0, 0.0, 1.0 - total) * was + weight
                x = tl.where(live & (h == i)[:, None, None], updated[None, :, :], x)
                p = tl.where(live & (h == i)[:, None], follows[None, :], p)
        length = tl.sqrt(tl.sum(m * m, axis=1) + NORM_EPS)
        new_r = r_w
        for i in range(R):
            row = now * R + i
            k, size = _key(read_keys, row, w, W)
            factor = tl.load(read_strengths + row) / size
            found = softmax(tl.sum(m * k[None, :], axis=1) * factor / length, ok)
            mode = modes + row * (1 + 2 * H)
            share = tl.load(mode + H)
            if TRACK_LINKS:
                weight = share * found
                was = _row(r_w, r, i)
                for head in range(H):
                    plane = _plane(x, h, head)
                    weight += tl.load(mode + head) * tl.sum(plane * was[:, None], axis=0)
                    weight += tl.load(mode + H + 1 + head) * tl.sum(plane * was[None, :], axis=1)
            else:
                weight = tl.where(share == 0.0, 0.0, found)
            if SAVE:
                tl.store(kept_read_content + (then * R + i) * N + n, found, mask=ok)
            if SHARPEN:
                if SAVE:
                    tl.store(kept_mixed + (then * R + i) * N + n, weight, mask=ok)
                weight = sharpened(weight, tl.load(sharpness + row), ok)
            new_r = tl.where((r == i)[:, None], weight[None, :], new_r)
            read = tl.where(live, tl.sum(weight[:, None] * m, axis=0), 0.0)
            tl.store(reads + row * W + w, read, mask=w < W)
        r_w = tl.where(live, new_r, r_w)
        if SAVE:
            if TRACK_USAGE:
                tl.store(kept_usage + then * N + n, u, mask=ok)
            tl.store(kept_read + then * R * N + read_lane, r_w, mask=read_ok)
            tl.store(kept_write + then * H * N + write_lane, w_w, mask=write_ok)
    tl.store(new_memory + b * N * W + cell, m, mask=cell_ok)
    tl.store(new_read_weights + b * R * N + read_lane, r_w, mask=read_ok)
    tl.store(new_write_weights + b * H * N + write_lane, w_w, mask=write_ok)
    if TRACK_USAGE:
        tl.store(new_usage + b * N + n, u, mask=ok)
    if TRACK_LINKS:
        tl.store(new_links + b * H * N * N + link, x, mask=link_ok)
        tl.store(new_precedence + b * H * N + write_lane, p, mask=write_ok)


def fits(slots: int, width: int, heads: int) -> bool:
    """Whether a program can keep the memory and the links of a batch item."""
    nb, wb, hb = (triton.next_power_of_2(extent) for extent in (slots, width, heads))
    return nb * max(wb, hb * nb) <= (LIMIT if heads == 1 else LIMIT // 2)


def scan(
    state: dict[str, Tensor],
    said: dict[str, Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    deallocate: bool,
    every: int,
    reads: Tensor,
    last: dict[str, Tensor],
    kept: dict[str, Tensor],
    saved: dict[str, Tensor],
    save: bool,
) -> None:
    """One launch on contiguous tensors: ``state`` (B, ...), ``said``, ``reads`` (B, T, ...), ``kept`` (T, B, ...).

    What ``last``, the state after the steps, has no elements of is not tracked.
    """
    (batch, slots, width), heads = state["memory"].shape, state["write_weights"].shape[1]
    steps, read_heads = reads.shape[1:3]
    nb, wb, hb = (triton.next_power_of_2(extent) for extent in (slots, width, heads))
    histories = ("write_content", "allocation", "read_content", "mixed", "usage", "read_weights", "write_weights")
    with on_device(reads):
        _scan[(batch,)](
            *(state[name] for name in STATE), *(said[name] for name in INTERFACE),
            reads if sharpness is None else sharpness, reads if step_mask is None else step_mask, reads,
            *(last[name] for name in STATE), *(kept[name] for name in histories), *saved.values(),
            batch, steps, slots, width, every,
            R=read_heads, RB=triton.next_power_of_2(read_heads), H=heads, HB=hb,
            TRACK_USAGE=last["usage"].numel() > 0, TRACK_LINKS=last["links"].numel() > 0, DEALLOCATE=deallocate,
            SHARPEN=sharpness is not None, HAS_MASK=step_mask is not None, SAVE=save, NB=nb, WB=wb,
            num_warps=8 if nb * max(wb, hb * nb) >= 2048 else 4, **EXACT,
        )  # fmt: skip
