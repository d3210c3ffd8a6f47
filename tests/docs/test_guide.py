"""Every code block of the guides runs, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "blocks", "files"),
    [
        ("guide", 15, ("memory.safetensors", "hops.json", "routing.json", "plots/reads.png", "plots/experts.png")),
        ("operators", 8, ("mine.py", "first.json")),
    ],
)
def test_every_block_runs(
    page: str, blocks: int, files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("transformers", "accelerate", "matplotlib"):
        pytest.importorskip(package)
    from typer.testing import CliRunner

    from memkern.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = ROOT / f"docs/{page}.md"
    text = path.read_text()
    names: dict[str, Any] = {"__name__": page}
    ran = 0
    for match in _BLOCK.finditer(text):
        language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 2
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
        else:
            assert language == "bash", f"line {line}: a block of {language} would not be run"
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                if program == "pip":
                    _check_extras(arguments)
                    continue
                assert program == "memkern"
                result = CliRunner().invoke(main, arguments)
                assert result.exit_code == 0, f"line {line}: {command}\n{result.output}{result.exception!r}"
        ran += 1
    assert ran >= blocks
    for file in files:
        assert (tmp_path / file).stat().st_size > 10


def test_the_guide_says_what_is_not_built() -> None:
    text = (ROOT / "docs/guide.md").read_text()
    assert "Memory compression, which the earlier guide planned, is not built" in text


def _check_extras(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"memkern\[([\w,]+)\]", " ".join(arguments)):
        assert set(wanted.split(",")) <= extras.keys()
