"""The README's Python blocks run, its commands exist, and its tables are those of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("number", range(len(re.findall(r"^```python$", README, re.MULTILINE))))
def test_python_blocks_run(number: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (memkern[models])")
    code = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(compile(code, f"README block {number}", "exec"), names)


def test_commands_and_targets_exist() -> None:
    known = {path.stem for path in (ROOT / "memkern" / "cli").iterdir() if not path.name.startswith("_")}
    for name in re.findall(r"^memkern (\w+)", README, re.MULTILINE):
        assert name in known, name
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\bmake (\w+)", README)) - {"sets"}:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_linked_files_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
