"""Hold the import rules of pyproject.toml ([tool.importlinter]) with import-linter.

import-linter does not see a folder without ``__init__.py``, symlinked or not. It reads a copy of the package in which
the links are real folders and every folder is a package. Arguments are passed on (``--verbose``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "lint"


def copy_package() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    # benchmarks/systems holds programs that measure whole models: like tests they may use every floor.
    keep_out = shutil.ignore_patterns("__pycache__", "*.so", "results", "systems")
    shutil.copytree(ROOT / "memkern", COPY / "memkern", symlinks=False, ignore=keep_out)
    shutil.copy(ROOT / "pyproject.toml", COPY)
    for folder, _, files in os.walk(COPY / "memkern"):
        if "__init__.py" not in files:
            (Path(folder) / "__init__.py").touch()


def main() -> int:
    copy_package()
    path = os.pathsep.join([str(COPY), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    result = subprocess.run(
        [*command, *sys.argv[1:]],
        cwd=COPY,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode or len(sys.argv) > 1:
        print(result.stdout)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
