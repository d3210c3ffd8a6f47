"""Checkpoint folders are whole or absent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memkern.training.checkpoints import (
    checkpoints,
    load_weights,
    random_state,
    set_random_state,
    write_checkpoint,
)


def test_newest_last_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}", lambda folder: _touch(folder / "a"), keep=3)
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_an_interrupted_write_leaves_what_was(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-5"
    write_checkpoint(target, lambda folder: _touch(folder / "whole"))

    def dies(folder: Path) -> None:
        _touch(folder / "half")
        raise KeyboardInterrupt

    for place in (target, tmp_path / "checkpoint-6"):
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(place, dies)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
    assert [path.name for path in target.iterdir()] == ["whole"]
    write_checkpoint(target, lambda folder: _touch(folder / "new"))
    assert [path.name for path in target.iterdir()] == ["new"]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "random.pt")
    drawn = torch.rand(3), random.random()
    set_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_weights_come_into_memory_of_their_own(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    place = model.weight.data_ptr()
    load_weights(model, tmp_path)
    assert torch.equal(model.weight, other.weight)
    assert model.weight.data_ptr() == place
    with pytest.raises(ValueError, match=r"missing \['0\.bias', '0\.weight'\], unknown \['bias', 'weight'\]"):
        load_weights(torch.nn.Sequential(torch.nn.Linear(3, 2)), tmp_path)


def _touch(path: Path) -> None:
    path.write_text("x")
