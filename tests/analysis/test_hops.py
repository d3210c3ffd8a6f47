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
    assert (first.hop_number, first.confidence, first.question_focus) == (1, 1.0, "who wrote it")
    assert tracker.memory_history == []
    chain = tracker.get_reasoning_chain("where was its author born", "London", ["Ada"])
    assert chain.total_confidence == pytest.approx(0.75)
    assert chain.success
    assert not tracker.get_reasoning_chain("q", " ").success
    assert [hop.extracted_info for hop in chain.hops] == ["Ada", "London"]
    tracker.reset()
    assert tracker.get_reasoning_chain("q", "a").total_confidence == 0.0
    with pytest.raises(ValueError, match="memory_info: expected the key 'read_weights'"):
        tracker.record_hop({})
    bare = HopTracker(track_attention=False)
    assert bare.record_hop(info(torch.eye(4)[None, :2])).memory_read_weights.size == 0
    assert len(bare.memory_history) == 1


def test_segments_bridges_and_hops(tmp_path: Path) -> None:
    tracker = HopTracker(min_attention_threshold=0.2)
    tracker.track_segment(0, torch.full((2, 4), 0.4), ["Ada", "Byron", "ada"])
    tracker.track_segment(1, torch.full((4,), 0.2), segment_text="then Ada left")
    tracker.track_segment(2, torch.tensor([0.9, 0.1]), {"Byron": [1], "Ada": [0]})
    tracker.track_segment(3, torch.tensor([0.0, 0.0]), ["Byron"])
    bridges = tracker.detect_bridge_entities()
    assert [(bridge.text, bridge.segments) for bridge in bridges] == [("ada", [0, 1, 2])]
    assert bridges[0].hop_count == 3
    assert bridges[0].avg_attention == pytest.approx(0.5)
    assert [b.text for b in tracker.detect_bridge_entities(min_attention=0.0)] == ["ada", "byron"]
    hops = tracker.detect_hops()
    assert [(hop.from_segment, hop.to_segment, hop.bridging_entity) for hop in hops] == [(0, 1, "ada"), (1, 2, "ada")]
    assert [hop.attention_flow for hop in hops] == pytest.approx([0.3, 0.55])
    assert [hop.confidence for hop in hops] == pytest.approx([0.6, 1.0])
    assert len(tracker.detect_hops(attention_threshold=0.5)) == 1
    assert [hop.to_segment for hop in tracker.get_hop_sequence()] == [1, 2]
    tracker.mark_answer("Ada, a poet", 1)
    assert [hop.to_segment for hop in tracker.get_hop_sequence()] == [1]
    assert [hop.to_segment for hop in tracker.get_hop_sequence(to_answer=False)] == [1, 2]
    statistics = tracker.get_statistics()
    assert (statistics["num_hops"], statistics["avg_hop_length"], statistics["max_hop_chain"]) == (2, 1.0, 2)
    assert statistics["answer_segment"] == 1
    content = json.loads(tracker.export_analysis(tmp_path / "deep" / "hops.json").read_text())
    assert content["hop_sequence_to_answer"][0]["bridging_entity"] == "ada"
    with pytest.raises(ValueError, match=r"answer_segment: expected one of \[0, 1, 2, 3\], got 7"):
        tracker.mark_answer("x", 7)
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
    assert "Al" in extract_simple_entities(text, min_length=2)


def test_metrics_and_debugger(tmp_path: Path) -> None:
    tracker = HopTracker()
    tracker.record_hop(info(torch.full((1, 2, 4), 0.25)), extracted_info="Ada")
    tracker.record_hop(info(torch.eye(4)[None, :1]))
    chains = [tracker.get_reasoning_chain("q", "the London", ["Ada", "x"]), tracker.get_reasoning_chain("q", "")]
    gold = [tracker.get_reasoning_chain("q", "London", ["Ada", "Byron"]), tracker.get_reasoning_chain("q", "Rome")]
    assert MultiHopMetrics.hop_accuracy(chains, gold) == {
        "exact_match": 0.5,
        "f1": 0.5,
        "partial_match": 1.0,
        "avg_confidence": pytest.approx(0.5),
        "success_rate": 0.0,
        "bridge_entity_recall": 0.5,
        "bridge_entity_precision": 0.5,
    }
    assert set(MultiHopMetrics.hop_accuracy([], []).values()) == {0.0}
    with pytest.raises(ValueError, match="gold_chains: expected 2, got 0"):
        MultiHopMetrics.hop_accuracy(chains, [])
    errors = MultiHopMetrics.analyze_error_patterns(chains)
    assert (errors["total_failures"], errors["missing_bridge"], errors["wrong_first_hop"]) == (2, 1, 2)
    path = MultiHopDebugger.export_reasoning_chain(chains[0], tmp_path / "chain.json")
    assert json.loads(path.read_text())["hops"][1]["read_weights"] == [[[1.0, 0.0, 0.0, 0.0]]]
    findings = " ".join(MultiHopDebugger.diagnose(tracker))
    assert "hop 1 reads without focus" in findings
    assert "all 2 hops read slot 0 most" in findings
    tracker.track_segment(0, [0.1], ["Ada"])
    tracker.track_segment(1, [0.1], ["Byron"])
    tracker.mark_answer("Byron", 1)
    findings = " ".join(MultiHopDebugger.diagnose(tracker))
    assert "no entity with enough attention is named in two segments" in findings
    assert "no chain of hops reaches the answer in segment 1" in findings
    odd = {"memory_state": torch.ones(1, 3, 2), "usage": torch.zeros(1, 3), "read_weights": torch.tensor(math.nan)}
    assert len(MultiHopDebugger.check_memory(odd)) == 3
    assert MultiHopDebugger.check_memory(info(torch.rand(1, 2, 4))) == []


def test_every_plot_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert analysis.VISUALIZATION_AVAILABLE
    one = info(torch.rand(2, 3, 4))
    draw = MemoryVisualizer(tmp_path / "plots", figsize=(4, 3), dpi=40)
    figures = [
        draw.plot_attention_heatmap(one["read_weights"], save_path="heat.png", show_values=True),
        draw.plot_usage_timeline([one["usage"], one["usage"]], save_path="usage.png"),
        draw.plot_temporal_links(one["temporal_links"], save_path="links.svg"),
        draw.plot_multi_head_comparison(one["read_weights"][0], save_path="heads.png"),
        draw.plot_attention_distribution(one["read_weights"], one["write_weights"], save_path="spread.png"),
        draw.plot_attention_heatmap(one["read_weights"][0, 0].numpy()),
        MemoryVisualizer.plot_memory_heatmap(one["memory_state"], save_path=tmp_path / "plots/memory.png"),
        MemoryVisualizer.plot_usage_pattern(one["usage"][0], one["temporal_links"], save_path=tmp_path / "plots/u.png"),
    ]
    assert all(figure.axes for figure in figures)
    gif = draw.create_animation([one, {"read_weights": one["read_weights"]}], "deep/a.gif")
    assert gif.read_bytes()[:3] == b"GIF"
    report = draw.create_summary_report({name: value[None] for name, value in one.items()})
    assert [file.name for file in report] == [
        f"summary_report_{name}.png"
        for name in ("read_attention", "write_attention", "usage_timeline", "temporal_links", "distribution")
    ]
    files = [file for file in (tmp_path / "plots").rglob("*.*") if file.is_file()]
    assert len(files) == 7 + 1 + 5
    assert all(file.stat().st_size > 500 for file in files)
    tracker = HopTracker()
    tracker.record_hop(one, "part")
    tracker.visualize_attention_flow(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="usage_history: expected at least one segment"):
        draw.plot_usage_timeline([])
    with pytest.raises(ValueError, match="memory_data: expected read_weights"):
        draw.create_summary_report({})
    with pytest.raises(ValueError, match="segment_data: expected at least one segment"):
        draw.create_animation([], "a.gif")
    with pytest.raises(ValueError, match="current_chain: expected at least one hop"):
        HopTracker().visualize_attention_flow()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkern.analysis.figures.VISUALIZATION_AVAILABLE", False)
    with pytest.raises(ImportError, match=r"memkern\[plot\]"):
        MemoryVisualizer.plot_usage_pattern([0.5])
