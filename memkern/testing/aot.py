"""Compiles Triton launchers ahead of time, for GPUs that are not here, and reports what the machine code uses.

A case is a function that calls a launcher with tensors on the ``meta`` device, of the sizes and strides to be checked::

    CASES = [aot.Case("large", lambda: routing.routing_entropy_fwd(torch.empty(4096, 8, device="meta")))]

Every kernel that the launcher starts is compiled instead of run, with the specialisation, block sizes and options
that it would run with, for each architecture of :data:`ARCHS` and by each Triton of :func:`toolchains`.
:func:`reports` does that in a process of its own, in which Triton's interpreter is off, and keeps the answers in
``build/`` until the kernels or the cases change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

ARCHS = (80, 90, 100)
"""Compute capabilities that every shipped configuration has to compile for: A100, H100 and H200, B200."""

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE.parent
# In a checkout what is compiled lies beside everything else that was built; an installed package stays as it is.
_BUILD = (_ROOT if (_ROOT / "pyproject.toml").exists() else Path(tempfile.gettempdir()) / "memkern") / "build"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a launcher on meta tensors.

    ``archs``: the capabilities whose configuration it is; ``second``: those that the second Triton compiles too, by
    default all of them. With ``MEMKERN_AOT=all`` every case is compiled for every capability by both.
    """

    name: str
    launch: Callable[[], object]
    archs: tuple[int, ...] = ARCHS
    second: tuple[int, ...] | None = None

    def wanted(self, toolchain: str) -> tuple[int, ...]:
        """The capabilities to compile for by the Triton of this name."""
        if os.environ.get("MEMKERN_AOT") == "all":
            return ARCHS
        return self.archs if self.second is None or toolchain == "installed" else self.second


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What one kernel of a case became."""

    case: str
    kernel: str
    arch: int
    triton: str
    grid: tuple[int, ...]
    num_warps: int
    registers: int
    stack: int
    """Bytes of local memory per thread; anything above 0 is a spill or an array indexed at run time."""
    shared: int
    opcodes: dict[str, int]
    """How often each machine instruction occurs, with its modifiers, such as ``LDG.E.128``."""

    def count(self, instruction: str) -> int:
        """Occurrences of an instruction: ``"LDG.E.128"`` also counts ``LDG.E.EF.128.CONSTANT``."""
        wanted = instruction.split(".")
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if opcode.split(".")[0] == wanted[0] and set(wanted) <= set(opcode.split("."))
        )

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.kernel} sm_{self.arch} triton {self.triton}: grid {self.grid}, "
            f"{self.num_warps} warps, {self.registers} registers, {self.stack} B stack, {self.shared} B shared"
        )


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contiguous tensor without memory, for the arguments of a case."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A Triton to compile with: the installed one (``folder`` None) or one that lies in a folder of its own."""

    name: str
    folder: Path | None

    @property
    def absent(self) -> str | None:
        """Why this Triton cannot be used here, or None."""
        if self.folder is None:
            return None if importlib.util.find_spec("triton") else "triton is not installed"
        if (self.folder / "triton").is_dir():
            return None
        return f"no second Triton in {self.folder} (pip install --no-deps --target {self.folder} triton==3.6.0)"


def toolchains() -> tuple[Toolchain, Toolchain]:
    """The installed Triton, and the one in ``MEMKERN_TRITON_ALT`` (by default ``.venv/triton36`` of the checkout)."""
    folder = os.environ.get("MEMKERN_TRITON_ALT") or _ROOT / ".venv" / "triton36"
    return Toolchain("installed", None), Toolchain("alternative", Path(folder))


@functools.cache
def reports(path: str, toolchain: Toolchain) -> tuple[KernelReport, ...]:
    """Compile the ``CASES`` of a Python file in a process of its own.

    Raises:
        RuntimeError: a kernel does not compile; the message ends with the compiler's.
    """
    target = _BUILD / "aot" / f"{_digest(Path(path), toolchain)}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process compiles while those beside it wait for its answer.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile_in_a_process(path, toolchain, target)
    return tuple(KernelReport(**{**fields, "grid": tuple(fields["grid"])}) for fields in json.loads(target.read_text()))


def _compile_in_a_process(path: str, toolchain: Toolchain, target: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folders = [str(toolchain.folder)] if toolchain.folder else []
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([*folders, str(_ROOT), *inherited])
    environment["TRITON_CACHE_DIR"] = str(_BUILD / "triton-cache" / toolchain.name)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        answer = Path(scratch) / "reports.json"
        program = [sys.executable, "-c", "from memkern.testing import aot; aot.main()"]
        command = [*program, path, str(answer), toolchain.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{Path(path).name} with the {toolchain.name} Triton:\n{done.stderr[-4000:]}")
        answer.replace(target)


def _digest(path: Path, toolchain: Toolchain) -> str:
    """Names the answer after everything it depends on."""
    digest = hashlib.sha256()
    kernels = _PACKAGE / "triton_kernels"
    for source in (path, Path(__file__), *sorted(kernels.rglob("*.py")), *sorted(kernels.rglob("*.json"))):
        digest.update(source.name.encode() + source.read_bytes())
    found = importlib.util.find_spec("triton")
    package = (toolchain.folder / "triton") if toolchain.folder else Path(str(found and found.origin)).parent
    digest.update((package / "__init__.py").read_bytes() + torch.__version__.encode())
    digest.update(os.environ.get("MEMKERN_AOT", "").encode())
    return digest.hexdigest()[:24]


def assert_clean(found: Sequence[KernelReport]) -> None:
    """No kernel spills, and none needs more shared memory than a block may have.

    Raises:
        AssertionError: with every kernel that does.
    """
    assert found, "nothing was compiled"
    limits = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
    bad = [str(r) for r in found if r.stack > 0 or r.shared > limits[r.arch]]
    assert not bad, "spills, or too much shared memory:\n" + "\n".join(bad)


def compile_cases(
    cases: Sequence[Case], archs: Sequence[int] = ARCHS, toolchain: str = "installed", jobs: int = 1
) -> list[KernelReport]:
    """Compile here, or in so many forks of this process; Triton's interpreter must be off."""
    import triton  # noqa: F401 - before the forks, which then have it

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    wanted = [(case, arch) for arch in archs for case in cases if arch in case.wanted(toolchain)]
    if jobs == 1:
        return [report for case, arch in wanted for report in _compile_case(case, arch)]
    # A fork finds the cases, which cannot be pickled, where they are.
    _inherited[:] = wanted
    with get_context("fork").Pool(jobs) as pool:
        return [report for found in pool.map(_compile_inherited, range(len(wanted)), chunksize=1) for report in found]


_inherited: list[tuple[Case, int]] = []


def _compile_inherited(index: int) -> list[KernelReport]:
    return _compile_case(*_inherited[index])


def _compile_case(case: Case, arch: int) -> list[KernelReport]:
    import triton

    with _compile_only(arch) as started:
        case.launch()
    found, seen = [], set()
    for kernel, grid in started:
        report = _report(case.name, kernel, grid, arch, triton.__version__)
        key = (report.kernel, report.grid, kernel.hash)
        if key not in seen:
            found.append(report)
            seen.add(key)
    return found


class _Driver:
    """Stands in for a GPU driver: says which architecture to compile for and which device is current."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return (self.target.backend, self.target.arch)  # kernels are kept per device, hence per architecture

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def _compile_only(arch: int) -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """Launches compile their kernel for ``arch`` and append it, with its grid, to the list; nothing runs."""
    import triton
    from triton.backends.compiler import GPUTarget

    started: list[tuple[Any, tuple[int, ...]]] = []
    jit = triton.runtime.jit.JITFunction
    real_run = jit.run
    before = triton.runtime.driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real_run(self, *args, grid=grid, warmup=True, **options)
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | options)
        started.append((kernel, tuple(int(extent) for extent in grid)))
        return kernel

    triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    jit.run = run
    try:
        yield started
    finally:
        jit.run = real_run
        triton.runtime.driver._active = before


def _report(case: str, kernel: Any, grid: tuple[int, ...], arch: int, version: str) -> KernelReport:
    usage, opcodes = _machine_code(kernel.asm["cubin"])
    return KernelReport(
        case=case,
        kernel=kernel.metadata.name,
        arch=arch,
        triton=version,
        grid=grid,
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        stack=max(usage["STACK"], usage["LOCAL"]),
        shared=kernel.metadata.shared,
        opcodes=opcodes,
    )


@functools.cache
def _machine_code(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    return found, dict(opcodes)


def main() -> None:
    """``aot.main()`` with ``FILE ANSWER TOOLCHAIN`` on the command line: compile the file's ``CASES``, write JSON."""
    path, answer, toolchain = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("aot_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # One test worker asks for the file while the others wait for the same answer.
    found = compile_cases(module.CASES, toolchain=toolchain, jobs=2)
    Path(answer).write_text(json.dumps([dataclasses.asdict(report) for report in found]))
