"""``memkern demo``: its quick steps run and leave their plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memkern.cli import main
from memkern.cli.demo import _steps


def test_quick_steps_run_and_leave_their_plot(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (memkern[models])")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (memkern[plot])")
    steps = ["--only", "machine", "--only", "routing", "--only", "search"]
    result = CliRunner().invoke(main, ["demo", *steps, "--folder", str(tmp_path), "--seconds", "0.5"])
    assert result.exit_code == 0, result.output
    assert "entropy of use" in result.output
    assert (tmp_path / "routing.png").stat().st_size > 1000


def test_a_missing_package_leaves_a_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(stage: _steps.Stage) -> None:
        raise ImportError("this step needs: pip install 'memkern[plot]'")

    monkeypatch.setattr(_steps, "STEPS", {"one": _steps.Step("a step", run)})
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 0
    assert "left out: this step needs" in result.output
    assert CliRunner().invoke(main, ["demo", "--only", "one"]).exit_code == 1


@pytest.mark.parametrize(("option", "value"), [("--only", "everything"), ("--seconds", "0")])
def test_bad_input(option: str, value: str) -> None:
    result = CliRunner().invoke(main, ["demo", option, value])
    assert result.exit_code == 2
    assert option in result.output


def test_recall_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from memkern.training import gmm_recall
    from memkern.training.gmm_recall import protocol

    def small(seconds: float | None = None) -> gmm_recall.Protocol:
        sizes = gmm_recall.Sizes(d_model=16, n_layer=1, n_head=2, d_inner=16, memory_tokens=2)
        curriculum = gmm_recall.Curriculum(steps=2, batch_size=4)
        return gmm_recall.Protocol(arms=("none",), seeds=(0,), sizes=sizes, curriculum=curriculum, test_documents=4)

    monkeypatch.setattr(protocol, "quick_protocol", small)
    result = CliRunner().invoke(main, ["demo", "--only", "recall-gmm", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no memory" in result.output
    assert (tmp_path / "recall-gmm.json").stat().st_size > 100
