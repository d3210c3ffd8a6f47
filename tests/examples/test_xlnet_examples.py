"""The examples run in a short form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def squad_file(tmp_path: Path) -> Path:
    context = "The Normans gave their name to Normandy, a region in France. Their leader was Rollo. " * 4
    answers = [{"text": text, "answer_start": context.index(text)} for text in ("France", "Rollo")]
    questions = [{"id": str(i), "question": f"Where or who {i}?", "answers": answers[i : i + 1]} for i in range(3)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": questions}]}]}))
    return path


def test_answer_spans(squad_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    module = example("validate_answer_spans")
    short = ["--max-length", "64", "--doc-stride", "16"]
    assert module.main([str(squad_file), *short]) == 0
    text = capsys.readouterr().out
    assert "3 questions, 0 broken, 2 answerable" in text
    assert "2 give the answer back" in text
    content = json.loads(squad_file.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    squad_file.write_text(json.dumps(content))
    assert module.main([str(squad_file), *short]) == 1
    assert "0: answer 'France' does not stand at" in capsys.readouterr().out


def test_differentiable_memory(squad_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("transformers", "accelerate", "matplotlib"):
        pytest.importorskip(package)
    module = example("train_with_differentiable_memory")
    output = tmp_path / "out"
    scores = module.main([str(squad_file), "--output", str(output), "--epochs", "1", "--max-length", "64"])
    assert scores["total"] == 3
    assert "stage 2" in capsys.readouterr().out
    assert (output / "plots/memory_usage_timeline.png").is_file()
    assert json.loads((output / "hops.json").read_text())["recorded_hops"]
