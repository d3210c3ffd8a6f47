"""``memkern train``, ``evaluate``, ``predict`` and ``recall`` on tiny data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memkern.cli import main
from memkern.cli._kinds import kind_of_model, presets, read_config
from memkern.training import GMMTrainingConfig, TrainingConfig

runner = CliRunner()
REAL = Path(__file__).parents[3] / "shared/data/squad-v2.0-dev-3articles.json"
TINY = ("max_seq_length=64", "doc_stride=16", "num_epochs=1", "max_n_segs=2", "train_batch_size=4", "tensorboard=false")
SIZES = "base_config={d_model: 16, n_layer: 1, n_head: 2, d_inner: 16}"


def run(*arguments: str) -> str:
    result = runner.invoke(main, list(arguments))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture
def squad_file(tmp_path: Path) -> Path:
    """A few questions in the official form: of the real file where it lies, else written here."""
    if REAL.exists():
        content = json.loads(REAL.read_text())
        paragraph = content["data"][0]["paragraphs"][0]
        content["data"] = [{"title": "t", "paragraphs": [{**paragraph, "qas": paragraph["qas"][:6]}]}]
    else:
        context = "The Normans gave their name to Normandy, a region in France, in the 10th and 11th centuries. " * 3
        answer = {"text": "France", "answer_start": context.index("France")}
        qas = [{"id": str(i), "question": f"Where is Normandy {i}?", "answers": [answer] * (i % 2)} for i in range(6)]
        content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    return path


def test_train_evaluate_predict(squad_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    output = tmp_path / "out"
    files = ("--train-file", str(squad_file), "--eval-file", str(squad_file), "--output-dir", str(output))
    text = run("train", "squad_tiny", *files, *sets(*TINY, SIZES, "save_steps=1", "tokenizer_vocab_size=200"))
    assert "gmm memory" in text
    assert "HasAns_f1" in text
    model = output / "final_model"
    scores = json.loads((output / "scores.json").read_text())
    assert scores["total"] == 6
    assert kind_of_model(model) == "xlnet"
    text = run(
        *("evaluate", str(model), str(squad_file), "--json", str(tmp_path / "s.json")),
        *("--predictions", str(tmp_path / "p.json")),
    )
    assert json.loads((tmp_path / "s.json").read_text()) == scores
    predictions = json.loads((tmp_path / "p.json").read_text())
    assert len(predictions) == 6
    run("predict", str(model), str(squad_file), "--json", str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == predictions
    (tmp_path / "context.txt").write_text("Rollo led the Normans.")
    one = ("--question", "Who led?", "--context", f"@{tmp_path / 'context.txt'}", "--json", str(tmp_path / "one.json"))
    run("predict", str(model), *one, *sets("no_answer_threshold=-.inf"))
    answer = json.loads((tmp_path / "one.json").read_text())["question"]
    assert answer
    assert answer in "Rollo led the Normans."
    text = run("train", "squad_tiny", *files, *sets(*TINY, SIZES, "save_steps=1"), "--resume")
    assert "final_model" in text


def test_presets_are_right() -> None:
    assert {"squad_tiny", "gmm_small", "gmm_balanced", "gmm_large", "token_memory"} <= set(presets())
    for name in presets():
        kind, fields = read_config(name)
        if kind == "xlnet":
            (GMMTrainingConfig if fields.get("use_gmm_memory") else TrainingConfig).from_dict(fields)
    assert read_config("gmm_small", ["learning_rate=1e-4", "run_name=x"])[1]["learning_rate"] == 1e-4
    assert "squad_tiny" in run("train", "--list")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "config: expected a file or a preset"),
        (["train", "nonsense"], "'nonsense' is no file and no preset"),
        (["train", "squad_tiny", "--set", "num_epochs"], "--set: expected name=value, got 'num_epochs'"),
        (["train", "squad_tiny", "--set", "num_epoch=1"], "unknown fields 'num_epoch'; did you mean num_epochs"),
        (["train", "squad_tiny", "--set", "kind=rnn"], "kind: expected one of xlnet"),
        (["train", "squad_tiny", "--train-file", "none.json"], "none.json"),
        (["evaluate", "nowhere", "x.json"], "model: no config.json in nowhere"),
        (["predict", "nowhere"], "dataset: expected a file, or --question with --context"),
        (["recall", "gmm", "--arm", "rnn"], "arms: unknown rnn"),
    ],
)
def test_errors_name_what_is_wrong(arguments: list[str], message: str) -> None:
    result = runner.invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_recall_gmm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from memkern.training import gmm_recall
    from memkern.training.gmm_recall import protocol as module

    def small(steps: int | None = None) -> Any:
        return gmm_recall.Protocol(
            arms=("none", "gmm", "gmm-reset"),
            seeds=(0,),
            curriculum=gmm_recall.Curriculum(steps=steps or 1, batch_size=4),
            sizes=gmm_recall.Sizes(d_model=16, n_layer=1, n_head=2, d_inner=16, memory_tokens=2),
            test_documents=4,
        )

    monkeypatch.setattr(module, "quick_protocol", small)
    text = run("recall", "gmm", "--quick", "--steps", "2", "--folder", str(tmp_path))
    assert "GMM, 4 experts, seed 0" in text
    assert "met: " in text.lower()
    for ending in ("json", "md"):
        assert (tmp_path / f"gmm-pointer-quick.{ending}").stat().st_size > 100
    assert "recall" in run("--help")
    assert "gmm" in run("recall", "--help")
