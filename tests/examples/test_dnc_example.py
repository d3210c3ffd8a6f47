"""The copy-and-recall example in a short form, and its tasks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from memkern.data import copy_task, recall_task

ROOT = Path(__file__).parents[2]


def test_copy_and_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("dnc_copy_and_recall", ROOT / "examples/dnc_copy_and_recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / "curve.png"
    pairs = module.main(["--output", str(path), "--seconds", "4", "--compare", "3", "--slots", "8", "--threads", "1"])
    assert [run.task for run, _ in pairs] == ["copy", "recall"]
    assert path.stat().st_size > 1000
    text = capsys.readouterr().out
    assert text.count("plain PyTorch:") == 2
    assert text.count("steps agree") == 2
    for run, plain in pairs:
        assert run.losses[-1] < run.losses[0]
        assert len(plain.losses) == 3


def test_the_copy_task_wants_the_sequence_after_the_flag() -> None:
    inputs, targets, counts = copy_task(5, 3, 4, torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 9, 5)
    assert targets.shape == (5, 9, 3)
    for row in range(5):
        length = int(inputs[row, :, 3].sum())
        assert counts[row].nonzero().flatten().tolist() == list(range(length + 1, 2 * length + 1))
        assert torch.equal(targets[row][counts[row]], inputs[row, :length, :3])
        assert inputs[row, length, 4] == 1


def test_the_recall_task_asks_for_the_value_of_a_key() -> None:
    inputs, targets, counts = recall_task(6, 3, 4, torch.Generator().manual_seed(0))
    for row in range(6):
        asked = int(inputs[row, :, 4].argmax())
        keys = inputs[row, :asked:2, :3]
        assert len({tuple(key.tolist()) for key in keys}) == len(keys)
        pair = int((keys == inputs[row, asked, :3]).all(-1).nonzero())
        assert torch.equal(targets[row, asked + 1], inputs[row, 2 * pair + 1, :3])
        assert counts[row].nonzero().item() == asked + 1
