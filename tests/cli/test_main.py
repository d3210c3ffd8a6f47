"""The command line itself: light to start, every module a command, errors that name the option."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from memkern.cli import CommandFolder, main

runner = CliRunner()


def test_help_lists_every_command() -> None:
    result = runner.invoke(main, ["--help"])
    assert result.exit_code == 0, result.output
    for name in ("info", "validate"):
        assert f" {name} " in result.output


def test_commands_have_help_of_their_own() -> None:
    for name in CommandFolder().list_commands(None):
        result = runner.invoke(main, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "--help" in result.output


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from memkern.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "heavy = {'transformers', 'triton', 'matplotlib', 'faiss', 'memkern.benchmarks.registry'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_version() -> None:
    import memkern

    assert runner.invoke(main, ["--version"]).output.strip() == f"memkern {memkern.__version__}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["validate", "--nonsense"]])
def test_unknown_words_are_refused(arguments: list[str]) -> None:
    assert runner.invoke(main, arguments).exit_code == 2
