"""The ahead-of-time compiler itself, on kernels whose machine code is known: wide loads, none, spills, tensor cores."""

from __future__ import annotations

import pytest
import torch

from memkern.testing import aot

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _copy(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < size), mask=offsets < size)


@triton.jit
def _square(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    block = tl.load(x + at)
    tl.store(y + at, tl.dot(block, block, input_precision="ieee"))


def copy(size: int, offset: int = 0) -> None:
    x = aot.meta(size + 8, dtype=torch.bfloat16)[offset : offset + size]
    grid = lambda options: (triton.cdiv(size, options["BLOCK"]),)  # noqa: E731
    _copy[grid](x, torch.empty_like(x), size, BLOCK=1024, num_warps=4, enable_fp_fusion=True)


def square(size: int, dtype: torch.dtype) -> None:
    x = aot.meta(size, size, dtype=dtype)
    _square[(1,)](x, aot.meta(size, size), SIZE=size, num_warps=4, enable_fp_fusion=True)


CASES = [
    aot.Case("aligned", lambda: copy(4096)),
    aot.Case("odd size", lambda: copy(4097)),
    aot.Case("offset", lambda: copy(4096, 1)),
    aot.Case("spills", lambda: square(64, torch.float32), archs=(80,)),
    aot.Case("tensor cores", lambda: square(64, torch.bfloat16)),
]


def found(toolchain: aot.Toolchain, case: str) -> list[aot.KernelReport]:
    return [report for report in aot.reports(__file__, toolchain) if report.case == case]


def test_the_real_specialisation_is_compiled(toolchain: aot.Toolchain) -> None:
    aligned, odd, offset = (found(toolchain, case) for case in ("aligned", "odd size", "offset"))
    assert [report.arch for report in aligned] == [80, 90, 100]
    assert all(report.count("LDG.E.128") == 1 and report.count("STG.E.128") == 1 for report in aligned)
    assert all(report.count("LDG.E.128") == 0 for report in odd + offset)
    assert all(report.count("STG.E.128") == 1 for report in offset)
    assert [report.grid for report in aligned] == [(4,)] * 3
    assert odd[0].grid == (5,)
    aot.assert_clean(aligned + odd + offset)


def test_spills_are_found(toolchain: aot.Toolchain) -> None:
    (report,) = found(toolchain, "spills")
    assert report.stack > 100
    with pytest.raises(AssertionError, match="spills: _square sm_80"):
        aot.assert_clean([report])


def test_tensor_cores_are_found(toolchain: aot.Toolchain) -> None:
    a100, h100, _ = found(toolchain, "tensor cores")
    assert a100.count("HMMA") > 0
    assert h100.count("HGMMA") > 0


def test_a_kernel_that_does_not_compile_says_why(toolchain: aot.Toolchain, tmp_path: object) -> None:
    broken = f"{tmp_path}/broken.py"
    with open(broken, "w") as file:
        file.write(
            "import triton, triton.language as tl\n"
            "from memkern.testing import aot\n"
            "@triton.jit\n"
            "def kernel(x):\n"
            "    tl.store(x, no_such_name)\n"
            "CASES = [aot.Case('broken', lambda: kernel[(1,)](aot.meta(1), enable_fp_fusion=True))]\n"
        )
    with pytest.raises(RuntimeError, match="no_such_name"):
        aot.reports(broken, toolchain)
