"""The position-recall experiment: its task, its phases, its arms, what it reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from memkern.cli import main
from memkern.training.rag_recall import Recall, RecallSettings, markdown, plot, run, verdicts
from memkern.training.rag_recall.evaluate import ARMS, curve_metrics
from memkern.training.rag_recall.run import NO_CONTRAST
from memkern.training.rag_recall.task import draw, with_distractors

TINY = replace(
    RecallSettings(),
    facts=8,
    keys=8,
    values=4,
    bins=4,
    chunks=2,
    d_model=32,
    d_ff=32,
    reader_steps=4,
    retriever_steps=2,
    anneal_steps=2,
    batch_documents=2,
    batch_questions=2,
    reader_documents=4,
    queries_per_bin=8,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def recall():
    return run(TINY, (0, 1))


def test_documents_have_every_key_once_and_values_keep_their_tokens():
    documents = draw(RecallSettings(), 3, seed=1)
    assert documents.facts.shape == (3, 32, 2)
    assert all(len(set(row.tolist())) == 32 for row in documents.facts[..., 0])
    few = draw(RecallSettings(), 50, seed=1, facts=2, keys=4)
    assert few.facts[..., 1].min() == documents.facts[..., 1].min()
    assert few.facts[..., 1].max() == documents.facts[..., 1].max()
    assert torch.equal(draw(RecallSettings(), 3, seed=1).facts, documents.facts)


def test_distractors_hold_the_wanted_fact_at_every_place():
    wanted = torch.arange(8).repeat(50)
    places = with_distractors(8, wanted, 4, torch.Generator().manual_seed(0))
    assert (places == wanted[:, None]).sum(1).eq(1).all()
    assert all(len(set(row)) == 4 for row in places.tolist())
    share = (places == wanted[:, None]).float().mean(0)
    assert (share - 0.25).abs().max() < 0.08


def test_every_arm_of_every_seed_counts_every_position(recall):
    assert recall.arms() == [*ARMS, NO_CONTRAST]
    for seed in recall.seeds:
        for counts in seed.arms.values():
            assert counts.asked == [2] * 8  # 8 questions a bin over two seeds and two positions
    assert recall.pooled("oracle chunks").found == recall.pooled("oracle chunks").asked
    assert recall.pooled("full context").found == recall.pooled("full context").asked
    assert recall.pooled("window").found == [0] * 6 + [4] * 2
    assert recall.pooled("self-rag").found == recall.pooled("shuffled order").found


def test_results_survive_a_file_and_spare_a_second_run(recall, tmp_path):
    content = json.loads(json.dumps(recall.to_dict()))
    again = Recall.from_dict(content)
    assert json.loads(json.dumps(again.to_dict())) == content
    went_on = run(TINY, (0, 1), previous=again)
    assert went_on.seeds == again.seeds
    assert set(content["bars"]) >= {"every bin", "max - min", "below oracle", "retrieval@k"}
    text = markdown(content)
    assert "oracle chunks" in text
    assert "(failed)" in text  # these models cannot read, and that is shown
    assert all(line.startswith(("- met", "- NOT MET")) for line in verdicts(content))
    plot(content, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_metrics_of_a_curve():
    found = curve_metrics([1, 0.8, 0.5, 0.5, 0.6, 0.5, 0.5, 0.7, 0.9, 1])
    assert found["flatness"] == pytest.approx(0.6988307, abs=1e-6)
    assert (found["primacy"], found["recency"]) == (1.0, 1.0)
    assert found["middle"] == pytest.approx(0.625)
    assert found["max_minus_min"] == pytest.approx(0.5)
    assert found["slope"] == pytest.approx(0.8 / 82.5)
    assert curve_metrics([0.0, 0.0])["flatness"] == 0.0


def test_the_command_writes_table_json_and_plot(recall, tmp_path, monkeypatch):
    import memkern.training.rag_recall as package

    monkeypatch.setattr(package, "quick_settings", lambda seconds=60.0: TINY)
    monkeypatch.setattr(package, "run", lambda *args, **options: recall)
    result = CliRunner().invoke(main, ["recall", "self-rag", "--quick", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "retrieval@2" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"self-rag-recall-quick.{end}" for end in ("json", "md", "png")
    ]
