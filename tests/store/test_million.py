"""The store's benchmark runs and checks what it loads."""

from __future__ import annotations

from pathlib import Path

import torch

from memkern.benchmarks.systems.store import measure


def test_measures_every_step(tmp_path: Path) -> None:
    found = measure(3000, 16, torch.bfloat16, tmp_path / "store")
    assert found["file_bytes"] > 3000 * 16 * 2
    assert all(value > 0 for value in found.values())
    assert {"add_seconds", "search_1_seconds", "save_seconds", "load_seconds"} <= found.keys()
