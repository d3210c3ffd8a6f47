"""The routing analyser on a stand-in whose routing is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memkern.analysis import GMMAnalyzer, ward_linkage

PROBS = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])


class StandIn(torch.nn.Module):
    """Routes every segment as PROBS says and counts how often the state came back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.states: list[Any] = []

    def get_memory_state(self) -> dict[str, torch.Tensor]:
        return {"expert_0": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "expert_1": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}

    def forward(self, memory_state: Any = None, **inputs: Any) -> dict[str, Any]:
        assert not self.training
        assert inputs.pop("return_routing_info")
        self.states.append(memory_state)
        return {"new_memory_state": len(self.states), "routing_info": {"routing_probs": PROBS}}


def analysed() -> GMMAnalyzer:
    model = StandIn().train()
    mask = torch.tensor([True, True, False])
    loader = [[{"input_ids": torch.zeros(3, 4), "document_mask": mask, "context": [""]}] * 2] * 2
    analyzer = GMMAnalyzer(model)
    analyzer.track_routing(loader)
    assert model.states == [None, 1, None, 3]
    assert model.training
    return analyzer


def test_numbers(tmp_path: Path) -> None:
    analyzer = analysed()
    assert analyzer.probs.shape == (8, 2)
    assert torch.allclose(analyzer.expert_activations(), torch.tensor([0.65, 0.35]))
    rows = PROBS[:2].double().numpy()
    assert analyzer.routing_entropy() == pytest.approx(float(-(rows * np.log(rows)).sum(1).mean()), rel=1e-6)
    assert analyzer.utilisation_entropy() == pytest.approx(-0.65 * np.log(0.65) - 0.35 * np.log(0.35), rel=1e-6)
    assert analyzer.utilisation_balance() == pytest.approx(1 / (1 + np.std([0.65, 0.35], ddof=1) / 0.5), rel=1e-6)
    assert analyzer.expert_similarity()[0, 1] == pytest.approx(0.5**0.5)
    assert analyzer.expert_diversity() == pytest.approx(1 - 0.5**0.5)
    assert analyzer.expert_clusters() == [[0.0, 1.0, 1.0, 2.0]]
    report = analyzer.report(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    pytest.importorskip("matplotlib")
    assert analyzer.plot(tmp_path / "experts.png").stat().st_size > 500


def test_limits() -> None:
    analyzer = GMMAnalyzer(StandIn())
    with pytest.raises(ValueError, match="nothing was tracked"):
        analyzer.report()
    analyzer.track_routing([[{"input_ids": torch.zeros(3, 4)}] * 5], max_segments=2)
    assert analyzer.probs.shape == (6, 2)
    with pytest.raises(ValueError, match="state: expected expert_0"):
        analyzer.expert_similarity({"memory": torch.zeros(2, 2)})


def test_ward_linkage_equals_scipy() -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    points = np.random.default_rng(0).normal(size=(9, 4))
    assert np.allclose(ward_linkage(points), hierarchy.ward(points))
