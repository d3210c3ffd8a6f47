"""The expert update's Triton kernels without a GPU: machine code ahead of time, launches and bytes counted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from memkern.testing import aot

pytest.importorskip("triton")

from memkern.triton_kernels import expert_update as kernels

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "meta") -> tuple[Any, ...]:
    rows, experts, slots, width = shape

    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    weight, bias = (experts, width, 2 * width), (experts, width)
    return (
        make(rows, experts, slots, width),
        make(rows, slots, width),
        make(rows, experts),
        make(*weight),
        make(*bias),
        make(*weight),
        make(*bias),
    )


def forward(shape: tuple[int, int, int, int], dtype: torch.dtype, save: bool = True, masked: bool = False) -> None:
    mask = aot.meta(shape[0], dtype=torch.bool) if masked else None
    kernels.update_experts_fwd(*inputs(shape, dtype), mask, save)


def backward(shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool = False) -> None:
    made = inputs(shape, dtype)
    rows, experts, slots, width = shape
    kept = torch.empty(rows, slots, experts, width, dtype=dtype, device="meta")
    mask = aot.meta(rows, dtype=torch.bool) if masked else None
    kernels.update_experts_bwd(made[0], *made, mask, kept, kept, True, True, True, True)


# (B, K, S, D); one case for each tile that ships.
LARGE, MIDDLE, FEW, SMALL = (64, 8, 128, 1024), (8, 4, 64, 768), (4, 4, 64, 768), (8, 4, 16, 768)
NARROW, ODD = (8, 2, 16, 256), (7, 3, 13, 333)

CASES = [
    aot.Case("forward large", lambda: forward(LARGE, BF16, masked=True)),
    aot.Case("forward middle", lambda: forward(MIDDLE, BF16), archs=(90, 100)),
    aot.Case("forward few", lambda: forward(FEW, torch.float16, save=False), archs=(80,)),
    aot.Case("forward small", lambda: forward(SMALL, BF16)),
    aot.Case("forward odd", lambda: forward(ODD, BF16), second=(90,)),
    aot.Case("forward float32", lambda: forward(LARGE, F32), second=(90,)),
    aot.Case("backward large", lambda: backward(LARGE, BF16)),
    aot.Case("backward narrow", lambda: backward(NARROW, BF16), second=(90,)),
    aot.Case("backward odd masked", lambda: backward(ODD, BF16, masked=True), second=(90,)),
    aot.Case("backward float32", lambda: backward(LARGE, F32, masked=True), second=(90,)),
    aot.Case(
        "aggregate",
        lambda: (
            kernels.aggregate_experts_fwd(aot.meta(*LARGE, dtype=BF16), aot.meta(64, 8, dtype=BF16)),
            kernels.aggregate_experts_bwd(
                aot.meta(64, 128, 1024, dtype=BF16), aot.meta(*LARGE, dtype=BF16), aot.meta(64, 8), True, True
            ),
        ),
    ),
    aot.Case(
        "slots",
        lambda: (
            kernels.gather_slots_fwd(aot.meta(8, 384, 768, dtype=BF16), aot.meta(8, 384, dtype=I64), IDS),
            kernels.gather_slots_bwd(aot.meta(8, 16, 768, dtype=BF16), aot.meta(8, 384, dtype=I64), IDS),
            kernels.scatter_slots_fwd(
                aot.meta(8, 384, 768, dtype=BF16), aot.meta(8, 16, 768, dtype=BF16), aot.meta(8, 384, dtype=I64), IDS
            ),
            kernels.scatter_slots_bwd(aot.meta(8, 384, 768, dtype=BF16), aot.meta(8, 384, dtype=I64), IDS, True, True),
        ),
    ),
]
IDS = aot.meta(16, dtype=I64)


def found(toolchain: aot.Toolchain, case: str) -> list[aot.KernelReport]:
    return [report for report in aot.reports(__file__, toolchain) if report.case.startswith(case)]


def test_nothing_spills(toolchain: aot.Toolchain) -> None:
    aot.assert_clean(aot.reports(__file__, toolchain))


def test_products_run_on_the_tensor_cores(toolchain: aot.Toolchain) -> None:
    for report in found(toolchain, "forward") + found(toolchain, "backward"):
        if "float32" in report.case or report.kernel == "_mix_backward":
            continue
        # Tiles of odd rows are too small for the instructions of a warp group.
        instruction = "HMMA" if "odd" in report.case else {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[report.arch]
        found_here = [report.count(name) for name in (instruction, "HGMMA", "UTCHMMA")]
        assert found_here[0] > 0 or ("odd" in report.case and max(found_here) > 0), str(report)


@pytest.mark.parametrize("size", ["small", "middle", "large"])
def test_forward_moves_tiles_as_bulk_tensor_copies(toolchain: aot.Toolchain, size: str) -> None:
    for report in found(toolchain, f"forward {size}"):
        bulk = report.count("UTMALDG"), report.count("UTMASTG")
        assert (min(bulk) > 0) == (report.arch >= 90), str(report)


def test_launches(toolchain: aot.Toolchain) -> None:
    for case, most in (("forward", 1), ("backward", 3)):
        for size in ("large", "odd"):
            reports = [r for r in found(toolchain, f"{case} {size}") if r.arch == 90]
            assert len(reports) == most, [str(r) for r in reports]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the Triton interpreter")
class TestTraffic:
    """Every byte once: what a tile's neighbours read again counts as resident, as the L2 cache holds it."""

    def test_update(self) -> None:
        from memkern.testing.traffic import count_traffic

        made = [torch.randn(x.shape) for x in inputs((2, 2, 16, 64), F32, "cpu")]
        with count_traffic() as traffic:
            out, gates, updates = kernels.update_experts_fwd(*made, None, True)
        least = sum(t.nbytes for t in (*made, out, gates, updates))
        assert len(traffic.launches) == 1
        again = ("states", "hiddens", "probs", "gate_weight", "update_weight", "gate_bias", "update_bias")
        assert traffic.moved(resident=again) <= 1.1 * least
        with count_traffic() as traffic:
            kernels.update_experts_bwd(torch.randn(out.shape), *made, None, gates, updates, True, True, True, True)
        assert len(traffic.launches) == 3
        d_products = 2 * out.nbytes
        # out stands for its gradient; d_products are written once and then read twice, as the states are.
        least = 2 * least + 3 * d_products + 2 * out.nbytes
        assert traffic.total.stored <= 1.1 * (sum(t.nbytes for t in made) + d_products)
        assert traffic.total.atomics <= 64
        assert traffic.total.unique_loaded <= least

    def test_aggregate_and_slots(self) -> None:
        from memkern.testing.traffic import count_traffic

        states, probs = torch.randn(3, 4, 5, 64), torch.rand(3, 4)
        with count_traffic() as traffic:
            out = kernels.aggregate_experts_fwd(states, probs)
        assert traffic.moved(resident=("probs",)) <= 1.1 * (states.nbytes + probs.nbytes + out.nbytes)
        with count_traffic() as traffic:
            d_states, d_probs = kernels.aggregate_experts_bwd(out, states, probs, True, True)
        least = sum(t.nbytes for t in (out, states, probs, d_states, d_probs))
        assert traffic.moved(resident=("grad",)) <= 1.1 * least
        ids, slot_ids = torch.randint(0, 6, (3, 40)), torch.arange(4)
        sequence = torch.randn(3, 40, 256)
        wanted = torch.isin(ids, slot_ids)
        with count_traffic() as traffic:
            means = kernels.gather_slots_fwd(sequence, ids, slot_ids)
        assert traffic.of(sequence).loaded == int(wanted.sum()) * 1024
        with count_traffic() as traffic:
            spliced = kernels.scatter_slots_fwd(sequence, means, ids, slot_ids)
        assert traffic.of(sequence).loaded == int((~wanted).sum()) * 1024
        assert traffic.of(spliced).stored == spliced.nbytes
