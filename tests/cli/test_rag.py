"""``memkern train | evaluate | generate`` for Self-RAG and hybrid models, on a small text."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memkern.cli import main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"Fact {i}: the {['red', 'blue', 'green'][i % 3]} box holds {i} coins. " for i in range(200))
    )
    return path


@pytest.mark.parametrize("preset", ["self_rag_tiny", "hybrid_tiny"])
def test_train_evaluate_generate(preset, text, tmp_path):
    folder = tmp_path / "out"
    changes = [
        "max_steps=3",
        "memory_warmup_steps=1",
        "save_steps=2",
        "batch_size=2",
        "passage_length=24",
        "prompt_length=8",
        "tokenizer_vocab_size=300",
        "progress_bar=false",
        "tensorboard=false",
    ]
    if preset == "hybrid_tiny":
        changes.append("segment_length=12")
    options = [part for change in changes for part in ("--set", change)]
    run = CliRunner().invoke
    result = run(main, ["train", preset, "--train-file", str(text), "--output-dir", str(folder), *options])
    assert result.exit_code == 0, result.output
    assert "eval_perplexity_without_memory" in result.output
    model = folder / "final_model"
    assert json.loads((folder / "scores.json").read_text())["eval_loss"] > 0
    resumed = run(main, ["train", preset, "--train-file", str(text), "--output-dir", str(folder), "--resume", *options])
    assert resumed.exit_code == 0, resumed.output
    result = run(main, ["evaluate", str(model), str(text), "--set", "passage_length=24", "--limit", "4"])
    assert result.exit_code == 0, result.output
    found = tmp_path / "found.json"
    arguments = ["generate", str(model), "--prompt", "Fact 3: the", "--memory", str(text), "--max-new-tokens", "4"]
    result = run(main, [*arguments, "--json", str(found)])
    assert result.exit_code == 0, result.output
    assert "in memory" in result.output
    assert json.loads(found.read_text())[0]["prompt"] == "Fact 3: the"


def test_errors_name_the_option(tmp_path):
    run = CliRunner().invoke
    result = run(main, ["generate", str(tmp_path), "--prompt", "x"])
    assert result.exit_code == 2
    assert "no config.json" in result.output
    result = run(main, ["train", "self_rag_tiny", "--train-file", str(tmp_path / "absent.txt")])
    assert result.exit_code == 2
    assert "absent.txt" in result.output
    (tmp_path / "config.json").write_text('{"model_type": "xlnet"}')
    result = run(main, ["generate", str(tmp_path), "--prompt", "x"])
    assert result.exit_code == 2
    assert "predict" in result.output
