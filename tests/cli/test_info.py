"""``memkern info`` says what is here and why the rest is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import memkern
from memkern import native
from memkern.cli import main

runner = CliRunner()


def test_json_holds_versions_backends_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKERN_CHECK", "0")
    result = runner.invoke(main, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["versions"]["memkern"] == memkern.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == memkern.backends.available()
    assert facts["operators"]["route_experts"]["reference"] is None
    for name, reason in facts["operators"]["route_experts"].items():
        assert (reason is None) == (name in facts["backends"]), (name, reason)
    assert facts["environment"]["MEMKERN_CHECK"] == "0"


def test_text_shows_every_operator_and_a_broken_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_ops_cpu.so").write_text("not a library")
    monkeypatch.setitem(native.LIBRARIES, "cpu", native.load("cpu", tmp_path))
    result = runner.invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    assert "route_experts" in result.output
    shown = " ".join(result.output.split())
    assert "does not load under torch" in shown
    assert "pip install" in shown
