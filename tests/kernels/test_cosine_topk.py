"""The search's Triton kernels ahead of time: no spills, tensor cores in the scan; and what they move."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from memkern.testing import aot

pytest.importorskip("triton")


def launchers() -> Any:
    from memkern.triton_kernels import cosine_topk

    return cosine_topk


def search(count: int, rows: int, width: int, k: int, dtype: torch.dtype, **options: Any) -> None:
    given = {"valid": None, "query_group": None, "row_group": None, "inverse_norms": None, "normalized": False}
    given |= options
    queries, database = aot.meta(1, count, width, dtype=dtype), aot.meta(1, rows, width, dtype=dtype)
    launchers().cosine_topk_fwd(queries, database, k, **given, min_score=-float("inf"))


def filtered(count: int, rows: int) -> dict[str, Any]:
    return {
        "valid": aot.meta(1, count, rows, dtype=torch.bool),
        "query_group": aot.meta(1, count, dtype=torch.int64),
        "row_group": aot.meta(1, rows, dtype=torch.int64),
    }


def backward(dtype: torch.dtype) -> None:
    queries, database = aot.meta(1, 64, 768, dtype=dtype), aot.meta(1, 5000, 768, dtype=dtype)
    grad, indices = aot.meta(1, 64, 10), aot.meta(1, 64, 10, dtype=torch.int64)
    launchers().cosine_topk_bwd(grad, queries, database, indices, None, False, True, True)


def norms(dtype: torch.dtype) -> None:
    database = aot.meta(1, 5000, 768, dtype=dtype)
    launchers().inverse_norms_fwd(database)
    launchers().inverse_norms_bwd(aot.meta(1, 5000), database)


# What decides speed is compiled for every architecture, the rest for one. Each odd choice below once spilled or failed.
CASES = [
    aot.Case("large bfloat16", lambda: search(4096, 1 << 20, 768, 100, torch.bfloat16), second=(80, 100)),
    aot.Case("large float32", lambda: search(4096, 1 << 20, 768, 100, torch.float32), archs=(90,), second=()),
    aot.Case(
        "few bfloat16, filters", lambda: search(8, 100_000, 768, 10, torch.bfloat16, **filtered(8, 100_000)),
        archs=(80, 100), second=(80,),
    ),
    aot.Case(
        "few float32, norms", lambda: search(8, 100_000, 128, 10, torch.float32, inverse_norms=aot.meta(1, 100_000)),
        archs=(90,), second=(),
    ),
    aot.Case(
        "odd width, large k", lambda: search(300, 100_001, 83, 2048, torch.float16, normalized=True),
        archs=(100,), second=(80,),
    ),
    aot.Case("backward", lambda: backward(torch.bfloat16), archs=(90,)),
    aot.Case("norms", lambda: norms(torch.float32), archs=(90,)),
]  # fmt: skip


def test_no_kernel_spills(toolchain: aot.Toolchain) -> None:
    aot.assert_clean(aot.reports(__file__, toolchain))


def test_the_scan_runs_on_tensor_cores(toolchain: aot.Toolchain) -> None:
    scans = [report for report in aot.reports(__file__, toolchain) if report.kernel == "scan"]
    searches = {case.name for case in CASES if case.name not in ("backward", "norms") and case.wanted(toolchain.name)}
    assert {report.case for report in scans} == searches
    for report in scans:
        wanted = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCMMA", "HMMA")}[report.arch]
        assert any(report.count(name) > 0 for name in wanted), f"no tensor cores: {report}"


def test_rounds_grow_and_cover_every_tile() -> None:
    search = launchers()
    for tiles in (1, 3, 4, 5, 100, 7813, 31250):
        for k in (1, 10, 100, 2048):
            plan = search.rounds_of(tiles, 128, k)
            assert sum(size for _, size in plan) == tiles
            assert [first for first, _ in plan] == [sum(size for _, size in plan[:i]) for i in range(len(plan))]
            assert plan[0][1] * 128 <= search.capacity_of(k), "the first round may not overflow a buffer"
            assert len(plan) <= 6
        step = search.coprime_step(tiles)
        assert sorted(i * step % tiles for i in range(tiles)) == list(range(tiles))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the Triton interpreter")
def test_few_queries_read_the_database_once() -> None:
    from memkern.testing.traffic import count_traffic

    queries, database = torch.randn(1, 2, 64), torch.randn(1, 512, 64)
    with count_traffic() as traffic:
        launchers().cosine_topk_fwd(queries, database, 3, None, None, None, None, False, -float("inf"))
    scanned = 512 * 64 * 4
    rescored = traffic.of(database).loaded - scanned
    # Besides the scan, the survivors of each query alone: here, in a database as small as a buffer, every row.
    assert 0 <= rescored <= 2 * scanned
