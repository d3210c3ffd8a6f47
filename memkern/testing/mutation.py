"""Plants a small, plausible mistake in a copy of the sources and asks whether the suite notices.

A mutation names a file, a text that occurs in it exactly once, what to put there, and the backend and tests that have
to turn red. Sources move; a text that is gone fails too, so that a list of mutations stays honest. Python and Triton
run as they lie in the copy; a C++ file of the CPU kernels is compiled with the flags it was built with, for the
instruction set in use, and linked with the other objects of that build.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ROOT / "compile_commands.json"
LIBRARY = "memkern/_ops_cpu.so"


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``; ``tests`` have to fail then on ``backend``.

    ``unit``: the C++ file to compile, where ``file`` is a header that it includes.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    backend: str = "reference"
    unit: str = ""


def no_build() -> str | None:
    """Why no C++ can be mutated here, or None."""
    if not COMMANDS.exists():
        return "the CPU library was not built in this checkout"
    if not all(Path(entry["output"]).exists() for entry in _library_commands()):
        return "the objects of the CPU library are gone"
    return None if shutil.which("g++") else "there is no g++"


def _library_commands() -> list[dict[str, str]]:
    """What was compiled for the library of the CPU operators."""
    commands: list[dict[str, str]] = json.loads(COMMANDS.read_text())
    targets = ("dispatch.dir", "_ops_cpu.dir", "cpu_DEFAULT.dir", "cpu_AVX2.dir", "cpu_AVX512.dir")
    return [entry for entry in commands if any(f"/{target}/" in entry["output"] for target in targets)]


class Suite:
    """A copy of the sources in ``root``, and a process that runs its tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", "results")
        for folder in ("memkern", "triton_kernels", "benchmarks", "tests", "csrc"):
            shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", root)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("_forked.py")],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, tests: str, backend: str) -> tuple[int, str]:
        """pytest's exit code and what it said."""
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--backend", backend, tests]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def check(self, mutation: Mutation) -> None:
        """Assert that the mutation turns its tests red, and that they are green without it."""
        original = (self.root / mutation.file).read_text()
        times = original.count(mutation.old)
        assert times == 1, f"{mutation.old!r} stands {times} times in {mutation.file}"
        compiled = mutation.file.startswith("csrc/")
        self._write(mutation.file, original.replace(mutation.old, mutation.new))
        try:
            if compiled:
                self._compile(mutation.unit or mutation.file)
            code, said = self.run(mutation.tests, mutation.backend)
        finally:
            self._write(mutation.file, original)
            if compiled:
                self._put_library(ROOT / LIBRARY)
        assert code == 1, f"not noticed:\n{said}"
        noticed = re.search(r"^FAILED (\S+)", said, re.MULTILINE)
        assert noticed, said
        code, said = self.run(noticed[1], mutation.backend)
        assert code == 0, f"not only the mutation fails:\n{said}"

    def _write(self, file: str, text: str) -> None:
        """Two texts of one length within one second look the same to Python's cache of compiled modules."""
        path = self.root / file
        path.write_text(text)
        if path.suffix == ".py":
            Path(cache_from_source(str(path))).unlink(missing_ok=True)

    def _compile(self, unit: str) -> None:
        """Link the library of the copy with ``unit`` as it is in the copy."""
        from memkern import _C

        isa = f"cpu_{str(_C.cpu_isa()).upper()}.dir"
        target, objects = self.root / "mutated.o", []
        for entry in _library_commands():
            if entry["file"] != str(ROOT / unit) or isa not in entry["output"]:
                objects.append(entry["output"])
                continue
            objects.append(str(target))
            command = [
                part.replace(str(ROOT / "csrc"), str(self.root / "csrc")) for part in shlex.split(entry["command"])
            ]
            # Half the compiler's time; -O3 is what the library itself is tested with.
            command = ["-O1" if part == "-O3" else part for part in command]
            command[command.index("-o") + 1] = str(target)
            _run(command, entry["directory"])
        assert str(target) in objects, f"{unit} is no part of the CPU library"
        library = self.root / "mutated.so"
        folder = Path(torch.__file__).parent / "lib"
        _run(["g++", "-shared", "-o", str(library), *objects, f"-L{folder}", "-ltorch_cpu", "-lc10"], str(self.root))
        self._put_library(library)

    def _put_library(self, library: Path) -> None:
        """Under a new inode: a process that has the old one mapped keeps it."""
        fresh = self.root / "fresh.so"
        shutil.copy(library, fresh)
        fresh.replace(self.root / LIBRARY)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
