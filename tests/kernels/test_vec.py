"""The CPU vector abstraction against the C library: errors in ulp, special values, conversions, tails, reductions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from memkern import native

ROOT = Path(__file__).resolve().parents[2]
# As CMakeLists.txt compiles the kernels.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Werror"]


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_functions_conversions_and_tails(isa: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    if isa != "default" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} needs an x86-64 processor")
    features = torch.backends.cpu.get_cpu_capability().lower()
    if (isa == "avx512" and features != "avx512") or (isa == "avx2" and features not in ("avx2", "avx512")):
        pytest.skip(f"this processor has no {isa}")
    program = tmp_path / "vec_check"
    source = ROOT / "tests" / "kernels" / "vec_check.cpp"
    define = f"-DMK_ISA_{isa.upper()}"
    command = [compiler, *FLAGS, "-Wno-psabi", f"-I{ROOT / 'csrc'}", define, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "exp float" in ran.stdout


def test_the_library_was_built_for_these_instruction_sets() -> None:
    library = native.LIBRARIES["cpu"]
    if not library.loaded:
        pytest.skip(str(library.reason))
    expected = "default avx2 avx512" if platform.machine() in ("x86_64", "AMD64") else "default"
    assert library.build["isas"] == expected
