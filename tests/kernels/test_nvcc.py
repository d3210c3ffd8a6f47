"""Every CUDA kernel compiles for the architectures that are shipped, and not one of them spills a register.

The suite takes those of the A100 and the H100; with ``MEMKERN_AOT=all`` that of the B200 too.

No GPU and no torch is needed, only nvcc. Results are kept under ``build/nvcc`` by a hash of everything that goes in, so
that a rerun compiles what changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("cuda/**/*.cu"))
ARCHITECTURES = ("80", "90a", *(("100",) if os.environ.get("MEMKERN_AOT") == "all" else ()))
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v,--warn-on-spills,--warning-as-error"]


@functools.cache
def _nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@functools.cache
def _common_hash(nvcc: str) -> bytes:
    """The compiler, its flags and every header that a kernel may include."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    headers = [
        p for folder in ("cuda", "common", "ops") for p in (CSRC / folder).rglob("*") if p.suffix in (".h", ".cuh")
    ]
    content = b"\0".join(str(p.relative_to(CSRC)).encode() + b"\0" + p.read_bytes() for p in sorted(headers))
    return hashlib.sha256(version.encode() + " ".join(FLAGS).encode() + content).digest()


def _compile(nvcc: str, source: Path, architecture: str) -> dict[str, object]:
    key = hashlib.sha256(_common_hash(nvcc) + architecture.encode() + source.read_bytes()).hexdigest()[:32]
    kept = ROOT / "build" / "nvcc" / f"{source.stem}-{architecture}-{key}.json"
    if kept.exists():
        found: dict[str, object] = json.loads(kept.read_text())
        return found
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, f"-I{CSRC}", "-gencode", target, "-cubin", str(source), "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    result: dict[str, object] = {"returncode": run.returncode, "log": run.stderr[-8000:]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(kept)  # two test processes may compile the same one
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.relative_to(CSRC / "cuda").as_posix())
def test_compiles_without_spills(source: Path, architecture: str) -> None:
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: neither in CUDA_HOME, CUDA_PATH or /usr/local/cuda nor on PATH")
    result = _compile(nvcc, source, architecture)
    assert result["returncode"] == 0, result["log"]
    assert "bytes spill stores" in str(result["log"]), "ptxas did not report its resources"
