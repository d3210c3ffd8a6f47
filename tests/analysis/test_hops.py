"""Hop tracking by both interfaces, with numbers worked out by hand; plots are files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from memkern import analysis
from memkern.analysis import (
    HopTracker,
    MemoryVisualizer,
    MultiHopDebugger,
    MultiHopMetrics,
    attention_confidence,
    extract_simple_entities,
)


def info(reads: torch.Tensor) -> dict[str, torch.Tensor]:
    batch, _heads, slots = reads.shape
    return {
        "read_weights": reads,
        "write_weights": reads,
        "usage": torch.linspace(0, 1, batch * slots).reshape(batch, slots),
        "temporal_links": torch.rand(batch, slots, slots),
        "memory_state": torch.randn(batch, slots, 5),
    }


def test_confidence() -> None:
    assert attention_confidence(torch.tensor([[[0.0, 1.0, 0.0]]])) == 1.0
    assert attention_confidence(torch.full((2, 3, 4), 0.25)) == pytest.approx(0.0, abs=1e-12)
    half = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
    assert attention_confidence(half) == pytest.approx(0.5)
    assert attention_confidence(0.3 * half) == pytest.approx(0.5)  # gated reads sum to less than 1
    assert attention_confidence(torch.cat((half, torch.eye(4)[None, :1]))) == pytest.approx(0.75)
    assert attention_confidence(torch.zeros(1, 1, 4)) == 0.0
    assert attention_confidence(torch.ones(2, 2, 1)) == 1.0


def test_reasoning_chain() -> None:
    tracker = HopTracker(track_attention=True, track_content=False)
    first = tracker.record_hop(info(torch.eye(4)[None, :2].requires_grad_()), "who wrote it", "Ada")
    tracker.record_hop(info(torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])), "where was she born", "London")
    assert (first.hop_number, first.confidence, first.memory_content) == (1, 1.0, None)
    chain = tracker.get_reasoning_chain("where was its author born", "London", ["Ada"])
    assert chain.total_confidence == pytest.approx(0.75)
    assert chain.success
    assert not tracker.get_reasoning_chain("q", " ").success
    assert [hop.extracted_info for hop in chain.hops] == ["Ada", "London"]
    tracker.reset()
    assert tracker.get_reasoning_chain("q", "a").total_confidence == 0.0
    with pytest.raises(ValueError, match="memory_info: expected the key 'read_weights'"):
        tracker.record_hop({})


def test_segments_bridges_and_hops(tmp_path: Path) -> None:
    tracker = HopTracker(min_attention_threshold=0.2)
    tracker.track_segment(0, torch.full((2, 4), 0.4), ["Ada", "Byron"])
    tracker.track_segment(1, torch.full((4,), 0.2), ["Ada"])
    tracker.track_segment(2, torch.tensor([0.9, 0.1]), {"Byron": [1], "Ada": [0]})
    assert tracker.detect_bridge_entities() == {"Ada": [0, 1, 2], "Byron": [0, 2]}
    assert tracker.detect_bridge_entities(min_segments=3) == {"Ada": [0, 1, 2]}
    hops = tracker.detect_hops()
    assert [(hop.from_segment, hop.to_segment, hop.entity) for hop in hops] == [
        (0, 1, "Ada"),
        (0, 2, "Byron"),
        (1, 2, "Ada"),
    ]
    assert [hop.attention_flow for hop in hops] == pytest.approx([0.3, 0.25, 0.55])
    assert [hop.confidence for hop in hops] == pytest.approx([0.6, 0.5, 1.0])
    tracker.mark_answer(1, "poet")
    assert [hop.to_segment for hop in tracker.get_hop_sequence()] == [1]
    assert [hop.to_segment for hop in tracker.get_hop_sequence(to_answer=False)] == [1, 2]
    statistics = tracker.get_statistics()
    assert statistics["num_hops"] == 3
    assert statistics["answer_segments"] == [1]
    content = json.loads(tracker.export_analysis(tmp_path / "deep" / "hops.json").read_text())
    assert content["hop_sequence"][0]["entity"] == "Ada"
    with pytest.raises(ValueError, match=r"segment_idx: expected one of \[0, 1, 2\], got 7"):
        tracker.mark_answer(7)
    with pytest.raises(ValueError, match="attention_weights: expected 1 or 2 axes"):
        tracker.track_segment(3, torch.zeros(1, 2, 3))


def test_threshold_may_come_first() -> None:
    assert HopTracker(0.3).min_attention_threshold == 0.3
    assert HopTracker(0.3).track_attention is True
    assert HopTracker().min_attention_threshold == 0.1
    with pytest.raises(ValueError, match="min_attention_threshold: expected 0 to 1"):
        HopTracker(min_attention_threshold=2)


def test_entities() -> None:
    text = "Ada Lovelace met Charles Babbage in London. It was Ada Lovelace. Al left."
    assert extract_simple_entities(text) == ["Ada Lovelace", "Charles Babbage", "London"]
    assert "Al" in HopTracker.extract_simple_entities(text, min_length=2)


def test_metrics_and_debugger() -> None:
    tracker = HopTracker()
    tracker.record_hop(info(torch.full((1, 2, 4), 0.25)))
    tracker.record_hop(info(torch.eye(4)[None, :1]))
    metrics = MultiHopMetrics()
    metrics.add(tracker.get_reasoning_chain("q", "the London", ["Ada"]), "London", ["Ada", "Byron"])
    metrics.add(tracker.get_reasoning_chain("q", ""), "Rome")
    report = metrics.compute()
    assert report["chains"] == 2
    assert report["exact"] == 0.5
    assert report["bridge_recall"] == 0.5
    assert report["mean_hops"] == 2
    findings = " ".join(MultiHopDebugger(tracker).diagnose())
    assert "hop 1 reads without focus" in findings
    assert "all 2 hops read slot 0 most" in findings
    tracker.track_segment(0, [0.1], ["Ada"])
    tracker.track_segment(1, [0.1], ["Byron"])
    tracker.mark_answer(1)
    findings = " ".join(MultiHopDebugger(tracker).diagnose())
    assert "no entity is named in two segments" in findings
    assert "no chain of hops reaches the answer in segment 1" in findings
    odd = {"memory_state": torch.ones(1, 3, 2), "usage": torch.zeros(1, 3), "read_weights": torch.tensor(math.nan)}
    assert len(MultiHopDebugger(tracker).check_memory(odd)) == 3
    assert MultiHopDebugger(tracker).check_memory(info(torch.rand(1, 2, 4))) == []


def test_every_plot_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert analysis.VISUALIZATION_AVAILABLE
    one = info(torch.rand(2, 3, 4))
    draw = MemoryVisualizer(tmp_path / "plots", figsize=(4, 3), dpi=40)
    files = [
        draw.plot_memory_heatmap(one["memory_state"]),
        draw.plot_usage_pattern(one["usage"][0]),
        draw.plot_attention_heatmap(one["read_weights"], tokens=["a", "b", "c", "d"]),
        draw.plot_usage_timeline([one["usage"], one["usage"]]),
        draw.plot_temporal_links(one["temporal_links"]),
        draw.plot_multi_head_comparison(one["read_weights"][0]),
        draw.plot_attention_distribution(one["read_weights"]),
        draw.create_animation([one["read_weights"], one["write_weights"]]),
        draw.create_summary_report(one),
        draw.plot_memory_heatmap(one["memory_state"], save_path=tmp_path / "own.svg"),
    ]
    assert len(set(files)) == len(files)
    for file in files:
        assert file.stat().st_size > 500, file
    assert files[7].read_bytes()[:3] == b"GIF"
    tracker = HopTracker()
    tracker.record_hop(one, "part")
    tracker.visualize_attention_flow(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="usages: expected at least one segment"):
        draw.plot_usage_timeline([])
    with pytest.raises(ValueError, match="memory_info: expected one of read_weights"):
        draw.create_summary_report({})


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("memkern.analysis.figures.VISUALIZATION_AVAILABLE", False)
    with pytest.raises(ImportError, match=r"memkern\[plot\]"):
        MemoryVisualizer(tmp_path).plot_usage_pattern([0.5])
