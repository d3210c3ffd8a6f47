"""The retrieval kernels without a GPU: machine code for three architectures, and bytes moved."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from memkern.testing import aot
from memkern.testing.aot import meta
from memkern.testing.traffic import count_traffic

pytest.importorskip("triton")
from memkern.triton_kernels import retrieval

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the Triton interpreter (TRITON_INTERPRET=1)"
)


def attention(
    batch: int,
    heads: int,
    count: int,
    pairs: int,
    width: int,
    bank: int = 0,
    *,
    dtype: torch.dtype = BF16,
    masked: bool = False,
    backward: bool = True,
) -> None:
    size = (batch, heads, count, pairs)
    q = meta(batch, heads, count, width, dtype=dtype)
    k = meta(batch, heads, bank, width, dtype=dtype) if bank else meta(*size, width, dtype=dtype)
    indices = meta(*size, dtype=torch.int64) if bank else None
    mask = meta(*size, dtype=torch.bool) if masked else None
    out, lse = retrieval.retrieved_attention_fwd(q, k, k, indices, mask, 0.125)
    if backward:
        retrieval.retrieved_attention_bwd(q, q, k, k, indices, mask, out, lse, 0.125, True, True)


def fuse(rows: int, width: int, count: int, dtype: torch.dtype = BF16) -> None:
    sources = [meta(1, rows, width, dtype=dtype) for _ in range(count)]
    gates = meta(1, rows, count + 1, dtype=dtype)
    retrieval.fuse_sources_fwd(sources, gates, list(range(count)))
    retrieval.fuse_sources_bwd(sources[0], sources, gates, list(range(count)))


def spans(segments: int, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    x, mask = meta(segments, tokens, dtype=dtype), meta(segments, tokens, dtype=torch.bool)
    document = meta(segments, dtype=torch.int64)
    _, stats = retrieval.span_loss_fwd(x, x, mask, mask, mask, document)
    retrieval.span_loss_bwd(meta(), x, x, mask, mask, mask, document, stats)


# What does not decide speed is compiled for one architecture.
CASES = [
    aot.Case("large", lambda: attention(8, 16, 2048, 64, 64), second=(90,)),
    aot.Case(
        "large float32 masked", lambda: attention(8, 16, 2048, 64, 64, dtype=torch.float32, masked=True), second=(90,)
    ),
    aot.Case("wide heads", lambda: attention(2, 4, 128, 16, 128), archs=(100,)),
    aot.Case("many pairs", lambda: attention(1, 2, 128, 300, 256), archs=(90,)),
    aot.Case("odd", lambda: attention(1, 3, 5, 7, 33), archs=(90,)),
    aot.Case("bank", lambda: attention(8, 16, 2048, 64, 64, bank=8192), second=(90,)),
    aot.Case("bank odd", lambda: attention(1, 3, 5, 7, 33, bank=11, dtype=torch.float32, masked=True), archs=(80,)),
    aot.Case("one of each", lambda: attention(1, 1, 1, 1, 1, bank=1, masked=True), archs=(90,), second=()),
    aot.Case("one segment", lambda: spans(1, 1), archs=(90,), second=()),
    aot.Case("fuse", lambda: fuse(16384, 1024, 3), second=(90,)),
    aot.Case("fuse wide", lambda: fuse(16, 5000, 16, torch.float32), archs=(80,)),
    aot.Case("spans", lambda: spans(64, 384), second=(90,)),
]


def found(toolchain: aot.Toolchain, case: str, kernel: str) -> list[aot.KernelReport]:
    return [r for r in aot.reports(__file__, toolchain) if (r.case, r.kernel) == (case, kernel)]


def test_no_kernel_spills(toolchain: aot.Toolchain) -> None:
    aot.assert_clean(aot.reports(__file__, toolchain))


@pytest.mark.parametrize("case", ["large", "large float32 masked", "bank"])
def test_pairs_are_moved_16_bytes_at_a_time(toolchain: aot.Toolchain, case: str) -> None:
    for kernel in ("_attention_fwd", "_attention_bwd"):
        reports = found(toolchain, case, kernel)
        assert {r.arch for r in reports} >= {90}
        assert all(r.count("LDG.E.128") >= 4 for r in reports)
    if case != "bank":
        assert all(r.count("STG.E.128") >= 4 for r in found(toolchain, case, "_attention_bwd"))
    else:
        assert all(r.count("LDG.E.128") >= 4 for r in found(toolchain, case, "_bank_bwd"))


def test_enough_blocks_fit_on_a_multiprocessor(toolchain: aot.Toolchain) -> None:
    """Bytes in flight hide the memory's latency: at least 16 warps of the forward, 12 of the backward kernel."""
    for kernel, warps in (("_attention_fwd", 16), ("_attention_bwd", 12)):
        for report in found(toolchain, "large", kernel):
            assert 65536 // (32 * report.registers) >= warps, str(report)


SIZE = (2, 2, 8, 16, 16)


def drawn(bank: int = 0) -> tuple[Any, ...]:
    batch, heads, count, _, width = SIZE
    q = torch.randn(batch, heads, count, width)
    size = (batch, heads, bank, width) if bank else SIZE
    indices = torch.randint(0, bank, SIZE[:4]) if bank else None
    return q, torch.randn(size), torch.randn(size), indices


@interpreted
def test_own_pairs_are_read_once_and_their_gradients_written_once() -> None:
    q, k, v, _ = drawn()
    with count_traffic() as forward:
        out, lse = retrieval.retrieved_attention_fwd(q, k, v, None, None, 0.25)
    assert len(forward.launches) == 1
    assert forward.moved() == q.nbytes + k.nbytes + v.nbytes + out.nbytes + lse.nbytes
    grad = torch.randn_like(out)
    with count_traffic() as backward:
        made = retrieval.retrieved_attention_bwd(grad, q, k, v, None, None, out, lse, 0.25, True, True)
    assert len(backward.launches) == 1
    assert backward.moved() == grad.nbytes + q.nbytes + k.nbytes + v.nbytes + lse.nbytes + sum(x.nbytes for x in made)
    assert backward.total.atomics == 0


@interpreted
def test_masked_pairs_cost_no_bytes() -> None:
    q, k, v, _ = drawn()
    mask = torch.zeros(SIZE[:4], dtype=torch.bool)
    mask[..., :4] = True
    with count_traffic() as traffic:
        retrieval.retrieved_attention_fwd(q, k, v, None, mask, 0.25)
    assert traffic.of(k).loaded == k.nbytes // 4
    assert traffic.of(v).loaded == v.nbytes // 4


@interpreted
def test_a_bank_is_gathered_without_a_copy_and_summed_without_atomics() -> None:
    q, k, v, indices = drawn(bank=24)
    batch, heads, count, pairs, width = SIZE
    gathered = 2 * batch * heads * count * pairs * width * 4
    with count_traffic() as forward:
        out, lse = retrieval.retrieved_attention_fwd(q, k, v, indices, None, 0.25)
    assert forward.moved() == q.nbytes + gathered + indices.nbytes + out.nbytes + lse.nbytes
    grad = torch.randn_like(out)
    with count_traffic() as backward:
        made = retrieval.retrieved_attention_bwd(grad, q, k, v, indices, None, out, lse, 0.25, True, True)
    assert [name for name, _ in backward.launches] == ["_attention_bwd", "_bank_bwd"]
    assert backward.total.atomics == 0
    # The first kernel gathers keys and values, the second queries and gradients; the rest is indices and rows.
    entries = indices.numel()
    lists = entries * (8 + 4 + 8) + 2 * entries * 4
    rows = 2 * (q.nbytes + grad.nbytes + k.nbytes) + sum(x.nbytes for x in made) + 3 * lse.nbytes
    searches = 2 * batch * heads * 24 * 4 * (entries.bit_length() + 1)
    assert backward.moved() <= 1.1 * (2 * gathered + lists + rows + searches)


@interpreted
def test_fusion_reads_and_writes_each_source_once() -> None:
    sources, gates = [torch.randn(2, 8, 64) for _ in range(3)], torch.randn(2, 8, 4)
    read = sum(x.nbytes for x in sources) + 3 * gates.nbytes // 4
    with count_traffic() as forward:
        out = retrieval.fuse_sources_fwd(sources, gates, [0, 1, 3])
    assert len(forward.launches) == 1
    assert forward.moved() == read + out.nbytes
    with count_traffic() as backward:
        d_sources, d_gates = retrieval.fuse_sources_bwd(out, sources, gates, [0, 1, 3])
    assert len(backward.launches) == 1
    assert backward.moved() == read + out.nbytes + sum(x.nbytes for x in d_sources) + d_gates.nbytes


@interpreted
def test_the_span_loss_reads_valid_logits_once_each_way() -> None:
    x, y = torch.randn(6, 40), torch.randn(6, 40)
    valid = torch.rand(6, 40) > 0.3
    right = torch.rand(6, 40) > 0.8
    document = torch.tensor([0, 0, 1, 1, 1, 4])
    with count_traffic() as forward:
        _, stats = retrieval.span_loss_fwd(x, y, right, right, valid, document)
    assert len(forward.launches) == 2
    assert forward.of(x).loaded == forward.of(y).loaded == 4 * int(valid.sum())
    with count_traffic() as backward:
        retrieval.span_loss_bwd(torch.ones(()), x, y, right, right, valid, document, stats)
    assert len(backward.launches) == 1
    assert backward.of(x).loaded <= 4 * int(valid.sum())
