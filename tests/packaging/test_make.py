"""The two commands: what the environment script wants, and that it works offline on a torch that is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("make"), reason="needs bash and make")


def make_env(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/make_env.sh", str(folder)], cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "CI": "", "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environment},
    )  # fmt: skip


def test_a_missing_tool_is_named_with_the_line_that_installs_it(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "cat", "paste", "tail", "sort", "mkdir", "make"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    done = make_env(checkout, tmp_path / "env", PATH=str(tools), CXX="no-such-compiler")
    assert done.returncode != 0
    assert "apt-get install g++" in done.stderr
    done = make_env(checkout, tmp_path / "env", PATH=str(tools), PYTHON="no-such-python", CXX="no-such-compiler")
    assert "apt-get install python3 python3-venv python3-dev g++" in done.stderr


@pytest.mark.slow
def test_an_existing_torch_is_used_offline(checkout: Path, tmp_path: Path) -> None:
    """As on a GPU image whose Python is itself a virtual environment: no index, torch as it is, an editable install."""
    environment = {**os.environ, "CI": "", "PIP_NO_INDEX": "1", "MEMKERN_BUILD_CPP": "0", "MEMKERN_BUILD_CUDA": "0"}
    done = subprocess.run(
        ["make", "build", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'env'}"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using torch" in done.stdout
    code = "import torch, pytest, sys, memkern; print(torch.__file__, sys.prefix, memkern.__file__, sep='\\n')"
    python = tmp_path / "env" / "bin" / "python"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    torch_file, prefix, memkern_file = found.stdout.splitlines()
    import torch

    assert torch_file == torch.__file__
    assert Path(prefix) == tmp_path / "env"
    assert Path(memkern_file).is_relative_to(checkout)
    version = subprocess.run([tmp_path / "env" / "bin" / "memkern", "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("memkern ")


def test_ci_refuses_to_skip_a_check(checkout: Path) -> None:
    """lint.sh skips what is not installed by name, and fails on it with CI=true."""
    fake = checkout / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for ci, code, word in (("", 0, "skipped"), ("true", 1, "FAILED")):
        done = subprocess.run(
            ["bash", "scripts/lint.sh", str(fake)], cwd=checkout, capture_output=True, text=True,
            env={**os.environ, "CI": ci},
        )  # fmt: skip
        assert done.returncode == code
        assert (done.stdout + done.stderr).count(word) == 4
