"""Checkpoint folders that are whole or absent, and everything that makes a resumed run the uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: str | Path) -> list[Path]:
    """The ``checkpoint-<step>`` folders in ``folder``, oldest first."""
    found = {int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def write_checkpoint(folder: Path, write: Callable[[Path], None], keep: int | None = None) -> None:
    """Fill a folder beside its place and move it there in one step; then drop the oldest beyond ``keep``.

    A run that ends in the middle leaves the checkpoints before it untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part)
    for path in part.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)
    if keep is not None:
        for path in checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(path)


def random_state() -> dict[str, Any]:
    """The states of the generators that training draws from."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """What :func:`random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights of a saved model into the parameters that are there.

    Tensors mapped from a file may lie off the boundaries that vectorised sums start at, and then round otherwise: what
    is to equal an uninterrupted run bit for bit has to live in memory of its own.

    Raises:
        ValueError: names that only one of the two has.
    """
    from safetensors.torch import load_file

    saved: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        saved |= load_file(path)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = model.state_dict().keys()
    if saved.keys() != kept:
        raise ValueError(
            f"{folder}: expected the parameters of this model; missing {sorted(kept - saved.keys())[:5]}, "
            f"unknown {sorted(saved.keys() - kept)[:5]}"
        )
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)
