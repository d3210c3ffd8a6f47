"""The document-level span loss in Triton: masses of segments, then of documents, then their mean in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import LAUNCH, arrive_last, cast, on_device, tickets


@triton.jit
def _log_add(best, mass, x, axis: tl.constexpr):
    """(maximum, sum of exp) of what was seen, with the block ``x`` of logarithms taken in along ``axis``."""
    new_best = tl.maximum(best, tl.max(x, axis=axis))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, mass * tl.exp(best - base) + tl.sum(tl.exp(x - tl.expand_dims(base, axis)), axis=axis)


@triton.jit
def _log_of(best, mass):
    return tl.where(mass == 0.0, float("-inf"), best + tl.log(tl.where(mass == 0.0, 1.0, mass)))


@triton.jit
def _span_segments(
    logits, positive, valid, partial, side, segments, tokens, sln, slt, spn, spt, svn, svt,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Log mass of each segment: rows 2 side (all valid tokens) and 2 side + 1 (the positive ones) of ``partial``."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < segments
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    right_best = best
    mass = tl.zeros((BLOCK_N,), tl.float32)
    right_mass = mass
    for start in range(0, tokens, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = live[:, None] & (t < tokens)[None, :]
        ok = inside & (tl.load(valid + n[:, None] * svn + t[None, :] * svt, mask=inside, other=0) != 0)
        right = ok & (tl.load(positive + n[:, None] * spn + t[None, :] * spt, mask=ok, other=0) != 0)
        x = tl.load(logits + n[:, None] * sln + t[None, :] * slt, mask=ok, other=float("-inf")).to(tl.float32)
        best, mass = _log_add(best, mass, x, 1)
        right_best, right_mass = _log_add(right_best, right_mass, tl.where(right, x, float("-inf")), 1)
    tl.store(partial + 2 * side * segments + n, _log_of(best, mass), mask=live)
    tl.store(partial + (2 * side + 1) * segments + n, _log_of(right_best, right_mass), mask=live)


@triton.jit
def _span_fwd_segments(
    start_logits, end_logits, start_positive, end_positive, valid, partial, segments, tokens,
    ssn, sst, sen, set_, spn, spt, sqn, sqt, svn, svt, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _span_segments(
            start_logits, start_positive, valid, partial, 0, segments, tokens, ssn, sst, spn, spt, svn, svt,
            BLOCK_N, BLOCK_T,
        )  # fmt: skip
    else:
        _span_segments(
            end_logits, end_positive, valid, partial, 1, segments, tokens, sen, set_, sqn, sqt, svn, svt,
            BLOCK_N, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _span_fwd_documents(
    partial, document, stats, sums, loss, ticket, segments, sd, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Log masses of each document over its segments; the last program adds the losses up, in order."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    side = tl.arange(0, 4)
    best = tl.full((4, BLOCK_M), float("-inf"), tl.float32)
    mass = tl.zeros((4, BLOCK_M), tl.float32)
    for start in range(0, segments, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < segments
        mine = (tl.load(document + n.to(tl.int64) * sd, mask=ok, other=-1)[None, :] == m[:, None]) & ok[None, :]
        x = tl.load(
            partial + side[:, None] * segments + n[None, :],
            mask=(side >= 0)[:, None] & ok[None, :],
            other=float("-inf"),
        )
        best, mass = _log_add(best, mass, tl.where(mine[None, :, :], x[:, None, :], float("-inf")), 2)
    log_mass = _log_of(best, mass)
    # Which of all and positive: rows 0 and 2 count for the loss, 1 and 3 against it.
    without = tl.sum(((side % 2 == 1)[:, None] & (log_mass == float("-inf"))).to(tl.int32), axis=0) > 0
    counts = ~without & (m < segments)
    log_mass = tl.where(counts[None, :], log_mass, float("inf"))
    tl.store(stats + side[:, None] * segments + m[None, :], log_mass, mask=(m < segments)[None, :])
    sign = tl.where(side % 2 == 0, 0.5, -0.5)
    own = tl.sum(tl.where(counts[None, :], log_mass * sign[:, None], 0.0), axis=0)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(own, axis=0))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(counts.to(tl.float32), axis=0))
    if arrive_last(ticket, tl.num_programs(0)):
        total = tl.zeros((), tl.float32)
        counted = tl.zeros((), tl.float32)
        for i in range(tl.num_programs(0)):
            total += tl.load(sums + 2 * i, volatile=True)
            counted += tl.load(sums + 2 * i + 1, volatile=True)
        tl.store(loss, total / tl.maximum(counted, 1.0))


@triton.jit
def _span_side(
    logits, positive, valid, stats, side, d_logits, factor, n, live, who, known, segments, tokens,
    sln, slt, spn, spt, svn, svt, BLOCK_T: tl.constexpr,
):  # fmt: skip
    norm = tl.load(stats + 2 * side * segments + who, mask=known, other=float("inf"))
    right_norm = tl.load(stats + (2 * side + 1) * segments + who, mask=known, other=float("inf"))
    counts = norm != float("inf")
    for start in range(0, tokens, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = live[:, None] & (t < tokens)[None, :]
        ok = inside & (tl.load(valid + n[:, None] * svn + t[None, :] * svt, mask=inside, other=0) != 0)
        ok = ok & counts[:, None]
        right = ok & (tl.load(positive + n[:, None] * spn + t[None, :] * spt, mask=ok, other=0) != 0)
        x = tl.load(logits + n[:, None] * sln + t[None, :] * slt, mask=ok, other=0.0).to(tl.float32)
        share = tl.where(ok, tl.exp(x - norm[:, None]), 0.0)
        right_share = tl.where(right, tl.exp(x - right_norm[:, None]), 0.0)
        d = tl.where(ok, factor * (share - right_share), 0.0)
        to = d_logits + n[:, None] * tokens + t[None, :]
        tl.store(to, cast(d, d_logits.dtype.element_ty), mask=inside)


@triton.jit
def _span_bwd(
    grad, start_logits, end_logits, start_positive, end_positive, valid, document, stats, d_start, d_end,
    segments, tokens, ssn, sst, sen, set_, spn, spt, sqn, sqt, svn, svt, sd,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    counted = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, segments, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        here = tl.load(stats + m, mask=m < segments, other=float("inf"))
        counted += (here != float("inf")).to(tl.float32)
    factor = 0.5 * tl.load(grad).to(tl.float32) / tl.maximum(tl.sum(counted, axis=0), 1.0)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < segments
    who = tl.load(document + n * sd, mask=live, other=-1)
    known = (who >= 0) & (who < segments)
    if tl.program_id(1) == 0:
        _span_side(
            start_logits, start_positive, valid, stats, 0, d_start, factor, n, live, who, known, segments, tokens,
            ssn, sst, spn, spt, svn, svt, BLOCK_T,
        )  # fmt: skip
    else:
        _span_side(
            end_logits, end_positive, valid, stats, 1, d_end, factor, n, live, who, known, segments, tokens,
            sen, set_, sqn, sqt, svn, svt, BLOCK_T,
        )  # fmt: skip


def _span_tile(tokens: int) -> tuple[int, int]:
    block_t = min(1024, triton.next_power_of_2(max(tokens, 1)))
    return max(1, min(16, 1024 // block_t)), block_t


def span_loss_fwd(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positive: Tensor,
    end_positive: Tensor,
    valid: Tensor,
    document: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::span_loss_fwd``: one launch over segments, one over documents."""
    segments, tokens = start_logits.shape
    device = start_logits.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    stats = torch.empty((4, segments), dtype=torch.float32, device=device)
    if segments == 0:
        return loss.zero_(), stats
    partial = torch.empty((4, segments), dtype=torch.float32, device=device)
    block_n, block_t = _span_tile(tokens)
    block_m = 16
    grid = triton.cdiv(segments, block_m)
    sums = torch.empty((grid, 2), dtype=torch.float32, device=device)
    with on_device(start_logits):
        _span_fwd_segments[(triton.cdiv(segments, block_n), 2)](
            start_logits, end_logits, start_positive, end_positive, valid, partial, segments, tokens,
            *start_logits.stride(), *end_logits.stride(), *start_positive.stride(), *end_positive.stride(),
            *valid.stride(), BLOCK_N=block_n, BLOCK_T=block_t, num_warps=4, **LAUNCH,
        )  # fmt: skip
        _span_fwd_documents[(grid,)](
            partial, document, stats, sums, loss, tickets(device, 1), segments, document.stride(0),
            BLOCK_M=block_m, BLOCK_N=64, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return loss, stats


def span_loss_bwd(
    grad: Tensor,
    start_logits: Tensor,
    end_logits: Tensor,
    start_positive: Tensor,
    end_positive: Tensor,
    valid: Tensor,
    document: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``memkern::span_loss_bwd``: one launch."""
    segments, tokens = start_logits.shape
    d_start = torch.empty((segments, tokens), dtype=start_logits.dtype, device=grad.device)
    d_end = torch.empty((segments, tokens), dtype=end_logits.dtype, device=grad.device)
    if d_start.numel() == 0:
        return d_start, d_end
    block_n, block_t = _span_tile(tokens)
    with on_device(grad):
        _span_bwd[(triton.cdiv(segments, block_n), 2)](
            grad, start_logits, end_logits, start_positive, end_positive, valid, document, stats, d_start, d_end,
            segments, tokens, *start_logits.stride(), *end_logits.stride(), *start_positive.stride(),
            *end_positive.stride(), *valid.stride(), document.stride(0),
            BLOCK_N=block_n, BLOCK_T=block_t, BLOCK_M=256, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return d_start, d_end
