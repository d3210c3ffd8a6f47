"""What ``make gpu`` does on a machine with a GPU: ``gpu.py test`` and ``gpu.py bench``.

Both build for the GPU at hand first. ``test`` runs the whole suite with triton and cuda required, then the operators
under compute-sanitizer where the machine allows it. ``bench`` times every operator beside the limits of the machine
and what is installed of its peers; it can be interrupted and goes on where it stopped while the kernels stay the same.
Results are files in ``benchmarks/results/<device>/``, with versions and a hash of the kernel sources.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(command: list[str], **environment: str) -> tuple[int, float]:
    """Exit code and seconds of a command, its output shown."""
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    return code, round(time.perf_counter() - start, 1)


def build() -> None:
    """Compile the CPU and CUDA operators, the latter for this GPU alone."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no GPU here")
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if (major, minor) >= (9, 0) else ""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}{suffix}"
    code, _ = run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        TORCH_CUDA_ARCH_LIST=architectures, MEMKERN_BUILD_CUDA="1",
    )  # fmt: skip
    if code:
        sys.exit(f"make gpu: the build failed with exit code {code}")


def results_folder() -> tuple[Path, dict[str, Any]]:
    from memkern.benchmarks import machine

    facts = machine.machine("cuda")
    folder = ROOT / "benchmarks" / "results" / machine.slug(facts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, facts


def test(arguments: list[str]) -> int:
    """The suite, and compute-sanitizer; writes checks.json."""
    folder, facts = results_folder()
    suite, seconds = run(
        [sys.executable, "-m", "pytest", "-q", "--require-backend", "triton", "--require-backend", "cuda", *arguments]
    )
    checks: dict[str, Any] = {"schema": 1, "machine": facts, "suite": {"exit_code": suite, "seconds": seconds}}
    checks["compute_sanitizer"] = sanitize()
    (folder / "checks.json").write_text(json.dumps(checks, indent=1) + "\n")
    print(json.dumps({name: value for name, value in checks.items() if name != "machine"}, indent=1))
    found = [entry["verdict"] for entry in checks["compute_sanitizer"].values()]
    return suite or int("errors" in found)


def sanitize() -> dict[str, dict[str, Any]]:
    """memcheck and racecheck over every operator's tiny shapes; "refused" where the machine does not allow it."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"memcheck": {"verdict": "refused", "reason": "compute-sanitizer is not installed"}}
    found: dict[str, dict[str, Any]] = {}
    for check in ("memcheck", "racecheck"):
        for backend in ("cuda", "triton"):
            command = [
                tool, "--tool", check, "--error-exitcode", "99", "--kernel-regex-exclude", "kns=at::native",
                sys.executable, "-m", "memkern", "validate", "--backend", backend, "--dtype", "float32",
                "--device", "cuda", "--save", str(ROOT / "build" / "sanitizer"),
            ]  # fmt: skip
            print("$", " ".join(command), flush=True)
            start = time.perf_counter()
            limit = 150
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                found[f"{check} {backend}"] = {"verdict": "unfinished", "reason": f"stopped after {limit} s"}
                continue
            output = (done.stdout + done.stderr).strip().splitlines()
            refused = any("not supported" in line or "Unable to" in line or "denied" in line for line in output)
            verdict = {0: "clean", 99: "errors"}.get(done.returncode, "refused" if refused else "errors")
            found[f"{check} {backend}"] = {
                "verdict": verdict,
                "exit_code": done.returncode,
                "seconds": round(time.perf_counter() - start, 1),
                "last_lines": output[-3:],
            }
    return found


def bench(arguments: list[str]) -> int:
    """Every operator's targets, all named sizes, then whole systems; writes ops.json, ops.png, end_to_end.json."""
    folder, _ = results_folder()
    operators = [
        *(sys.executable, "-m", "memkern", "bench", "--device", "cuda", "--resume"),
        *("--json", str(folder / "ops.json"), "--plot", str(folder / "ops.png"), *arguments),
    ]
    sizes = [word for size in ("small", "medium", "large") for word in ("--size", size)]
    dtypes = ["--dtype", "bfloat16", "--dtype", "float32"]
    systems = [sys.executable, "-m", "memkern.benchmarks.systems.end_to_end", "--device", "cuda"]
    runs = [operators, [*operators, *sizes, *dtypes], [*systems, "--json", str(folder / "end_to_end.json")]]
    return max(run(command)[0] for command in runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "bench"])
    chosen, rest = parser.parse_known_args()
    build()
    return {"test": test, "bench": bench}[chosen.what](rest)


if __name__ == "__main__":
    sys.exit(main())
