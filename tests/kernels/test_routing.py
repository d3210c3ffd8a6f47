"""The routing kernels without a GPU: what they compile to for each architecture, and the bytes they move."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memkern.testing import aot
from memkern.testing.aot import meta

pytest.importorskip("triton")


def _route(shape: tuple[int, int, int, int], dtype: torch.dtype, pooling: int = 0, *, masks: bool = False) -> None:
    """Forward and backward of route_experts as training calls them."""
    from memkern.triton_kernels import routing

    rows, slots, width, experts = shape
    hiddens, weight = meta(rows, slots, width, dtype=dtype), meta(experts, width, dtype=dtype)
    query = meta(width, dtype=dtype) if pooling == 2 else None
    slot_mask = meta(rows, slots, dtype=torch.bool) if masks else None
    row_mask = meta(rows, dtype=torch.bool) if masks else None
    bias, temperature = meta(experts, dtype=dtype), meta() if masks else None
    given = temperature, 0.7, pooling, query, slot_mask, row_mask
    probs, logits, entropy, loss, *saved = routing.route_experts_fwd(hiddens, weight, bias, *given, 10.0, True)
    need = (True, True, masks)
    routing.route_experts_bwd(probs, logits, entropy, loss, hiddens, weight, *given, *saved, 10.0, False, *need)


def _rows(rows: int, experts: int, dtype: torch.dtype) -> None:
    from memkern.triton_kernels import routing

    x, grad, mask = meta(rows, experts, dtype=dtype), meta(rows), meta(rows, dtype=torch.bool)
    routing.temperature_softmax_fwd(x, None, 0.7, 10.0)
    routing.temperature_softmax_bwd(x, x, meta(), 1.0, 10.0, True)
    routing.routing_entropy_fwd(x)
    routing.routing_entropy_bwd(grad, x)
    _, loss_weights = routing.load_balance_loss_fwd(x, mask)
    routing.load_balance_loss_bwd(meta(), x, mask, loss_weights)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Every branch of the configuration: the benchmarks' sizes, and where block sizes or kernels change. What decides speed
# is compiled for every architecture, by both Tritons where it matters most; the rest for one.
EVERYWHERE, BY_BOTH = ("small", "large", "token", "many experts", "rows"), ("large", "token")


def _case(name: str, launch: Callable[[], object]) -> aot.Case:
    archs = aot.ARCHS if name in EVERYWHERE else (90,)
    return aot.Case(name, launch, archs, aot.ARCHS if name in BY_BOTH else (90,))


CASES = [
    _case(name, functools.partial(_route, *arguments, **options))
    for name, arguments, options in (
        ("small", ((8, 16, 768, 4), BF16), {}),
        ("small float32", ((8, 16, 768, 4), F32), {"masks": True}),
        ("large", ((4096, 128, 1024, 8), BF16), {}),
        ("large max", ((4096, 128, 1024, 8), BF16, 1), {"masks": True}),
        ("large attention", ((4096, 128, 1024, 8), BF16, 2), {"masks": True}),
        ("attention of wide slots", ((64, 16, 8192, 16), F32, 2), {}),
        ("attention of slots read twice", ((64, 16, 10000, 64), F16, 2), {}),
        ("token", ((16384, 1, 4096, 256), BF16), {}),
        ("token float32", ((16384, 1, 4096, 256), F32), {}),
        ("token of few experts", ((16384, 1, 4096, 8), BF16), {}),
        ("many experts", ((64, 16, 1000, 67), F32), {"masks": True}),
        ("many experts max", ((2048, 4, 1024, 128), BF16, 1), {}),
    )
]
CASES += [
    _case(name, functools.partial(_rows, *arguments))
    for name, arguments in (("rows", (4096, 8, BF16)), ("wide rows", (64, 8192, F32)))
]


def test_no_kernel_spills(toolchain: aot.Toolchain) -> None:
    found = aot.reports(__file__, toolchain)
    aot.assert_clean(found)
    assert {r.case for r in found} == {case.name for case in CASES}


def test_launches(toolchain: aot.Toolchain) -> None:
    """One launch forward with the loss in it, two backward."""
    for case in CASES[:12]:
        kernels = [r.kernel for r in aot.reports(__file__, toolchain) if r.case == case.name and r.arch == 90]
        assert kernels == ["_forward", "_backward_rows", "_backward_weight"]


@pytest.mark.parametrize("case", ["large", "large max", "large attention"])
def test_the_input_moves_in_16_bytes(case: str, toolchain: aot.Toolchain) -> None:
    for report in aot.reports(__file__, toolchain):
        if report.case == case and report.kernel in ("_forward", "_backward_rows"):
            assert report.count("LDG.E.128" if report.kernel == "_forward" else "STG.E.128") > 0, report


def test_matrix_products_use_the_tensor_cores(toolchain: aot.Toolchain) -> None:
    """Token routing in bfloat16: one unmasked slot goes into the product as it is."""
    for report in aot.reports(__file__, toolchain):
        if report.case.startswith("token") and "float32" not in report.case and report.kernel == "_forward":
            name = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[report.arch]
            assert report.count(name) + report.count("HMMA") > 0, report


def _traffic(shape: tuple[int, int, int, int], pooling: str, masks: bool) -> tuple[Any, Any, Any]:
    """Counted traffic of forward and backward, and the least of the benchmark's description."""
    from benchmarks.registry import spec
    from memkern.testing.traffic import count_traffic
    from memkern.triton_kernels import routing

    op = spec("route_experts")
    options = {"pooling": pooling, "masks": masks}
    named = dict(zip("BSDK", shape, strict=True))
    made = op.make(named, options, F32, torch.device("cpu"), torch.Generator().manual_seed(0))
    hiddens, weight, bias = made["hiddens"], made["weight"], made["bias"]
    code = ("mean", "max", "attention").index(pooling)
    given = None, 0.7, code, made.get("pool_query"), made.get("slot_mask"), made.get("row_mask")
    with count_traffic() as forward:
        probs, logits, entropy, loss, *saved = routing.route_experts_fwd(hiddens, weight, bias, *given, 10.0, True)
    grads = probs.clone(), logits.clone(), entropy.clone(), loss.clone()
    with count_traffic() as backward:
        routing.route_experts_bwd(*grads, hiddens, weight, *given, *saved, 10.0, False, True, True, False)
    return forward, backward, op.work(named, options, F32)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_traffic(pooling: str, masks: bool) -> None:
    """Each way at most 1.1 times the bytes that have to move; the weight stays in the cache from row to row."""
    forward, backward, work = _traffic((4, 64, 256, 4), pooling, masks)
    assert forward.moved(resident=["weight"]) <= 1.1 * (work.forward.bytes + work.saved), forward
    assert backward.moved(resident=["weight"]) <= 1.1 * work.backward.bytes, backward
    assert [name for name, _ in forward.launches] == ["_forward"]
    assert [name for name, _ in backward.launches] == ["_backward_rows", "_backward_weight"]
