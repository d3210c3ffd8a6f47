"""The three phases, what a batch's memory may hold, evaluation, checkpoints and resuming."""

from __future__ import annotations

import math

import pytest
import torch

from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer
from memkern.training.rag_config import RAGTrainingConfig
from memkern.training.rag_data import collate, indices, leaks, recall_items
from memkern.training.rag_trainer import RAGTrainer

VOCABULARY = 128


def model(**changes):
    torch.manual_seed(0)
    settings = {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 1,
        "d_ff": 16,
        "vocab_size": VOCABULARY,
        "max_seq_len": 64,
        "max_chunks": 64,
        "chunk_size": 8,
        "chunk_overlap": 0,
        "top_k": 2,
        "dropout": 0.1,
    }
    config = SelfRAGConfig(**{**settings, **changes})
    return SelfRAGModel(SelfRAGTransformer(config), config=config)


def items(count=6, chunks=3):
    draw = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(1, 120, (10 + i % 3,), generator=draw),
            "context_chunks": [torch.randint(1, 120, (6,), generator=draw).tolist() for _ in range(chunks)],
            "positive": i % chunks,
        }
        for i in range(count)
    ]


def config(folder, **changes):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_steps": 6,
        "memory_warmup_steps": 2,
        "position_recall_steps": 1,
        "position_recall_facts": 4,
        "output_dir": str(folder),
        "save_steps": 3,
        "eval_steps": 0,
        "logging_steps": 1,
        "progress_bar": False,
    }
    return RAGTrainingConfig(**{**settings, **changes})


class Spy(RAGTrainer):
    """Notes what each micro-batch's forward met."""

    def forward(self, batch, phase):
        found = super().forward(batch, phase)
        self.seen = [*getattr(self, "seen", []), (phase, batch, list(self.model.memory), found)]
        return found


def test_phases_and_what_the_memory_holds(tmp_path):
    trainer = Spy(model(), config(tmp_path), items())
    state = trainer.train()
    assert [phase for phase, *_ in trainer.seen] == [1] * 4 + [2] * 6 + [3] * 2
    for phase, batch, memory, found in trainer.seen:
        if phase == 1:
            assert memory == []
            assert found.contrastive_loss is None
            continue
        context = {tuple(chunk) for row in batch.chunks for chunk in row}
        assert {tuple(chunk.token_ids) for chunk in memory} == context  # of this batch alone
        assert found.contrastive_loss > 0
        if phase == 3:
            assert batch.labels.ne(-100).sum(1).tolist() == [1, 1]
            assert {chunk.metadata["group"] for chunk in memory} == {0, 1}
    assert [entry["phase"] for entry in state.log_history] == [1, 1, 2, 2, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in state.log_history)


def test_a_text_that_is_predicted_stays_out_of_the_memory(tmp_path):
    data = items(2)
    data[0]["context_chunks"][1] = data[1]["input_ids"][2:9].tolist()
    data[1]["context_chunks"][0] = [*range(30), *data[0]["input_ids"].tolist(), 5, 6]
    trainer = Spy(model(), config(tmp_path, max_steps=2, memory_warmup_steps=0, position_recall_steps=0), data)
    trainer.train()
    for _, batch, memory, _ in trainer.seen:
        kept = [chunk.token_ids for chunk in memory]
        assert len(kept) == 4
        rows = batch.input_ids.tolist()
        assert not any(leaks(chunk, rows) or leaks(row, [chunk]) for chunk in kept for row in rows)
    assert trainer.state.dropped_chunks == 2 * 4


def test_leaks_are_runs_of_more_than_half_a_chunk():
    text = [[1, 2, 3, 4, 5, 6]]
    assert leaks([2, 3, 4], text)
    assert leaks([9, 3, 4, 5], text)
    assert not leaks([3, 4, 9, 9], text)
    assert not leaks([7, 5], text)  # the value of a fact that answers a question
    assert leaks([5], text)


def test_rows_may_share_a_chunk_or_keep_to_their_own(tmp_path):
    data = items(2)
    data[1]["context_chunks"] = data[0]["context_chunks"]
    for share, expected in ((True, 3), (False, 6)):
        trainer = RAGTrainer(model(), config(tmp_path, share_batch_memory=share), data)
        batch = trainer.collate(data)
        positives = trainer.populate(batch, isolated=not share)
        assert len(trainer.model.memory) == expected
        assert [trainer.model.memory.get(id).token_ids for id in positives] == [
            batch.chunks[row][at] for row, at in enumerate(batch.positives)
        ]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = RAGTrainer(model(), config(tmp_path / "a", memory_dropout=0.5), items())
    whole.train()
    half = RAGTrainer(model(), config(tmp_path / "b", memory_dropout=0.5), items())
    half.config.max_steps = 3
    half.config.position_recall_steps = 0
    learning_rate = whole.learning_rate
    half.learning_rate = learning_rate
    half.train()
    resumed = RAGTrainer(model(), config(tmp_path / "c", memory_dropout=0.5), items())
    resumed.train(resume_from_checkpoint=tmp_path / "b" / "checkpoint-3")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.state.log_history == whole.state.log_history
    assert (tmp_path / "b" / "checkpoint-3" / "memory" / "store.json").exists()
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        resumed.train(resume_from_checkpoint=tmp_path)


def test_checkpoints_are_limited_and_load(tmp_path):
    trainer = RAGTrainer(model(), config(tmp_path, save_steps=1, save_total_limit=2), items())
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    again = SelfRAGModel.from_pretrained(tmp_path / "checkpoint-6")
    assert len(again.memory) == len(trainer.model.memory) > 0


def test_evaluation_leaves_the_store_and_compares_with_no_memory(tmp_path):
    trainer = RAGTrainer(model(), config(tmp_path), items(), eval_dataset=items(3))
    trainer.model.write_to_memory("kept", [1, 2, 3])
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["eval_loss"] != found["eval_loss_without_memory"]
    assert set(found) >= {"recall@1", "recall@5", "mrr", "ndcg@5"}
    assert trainer.model.memory.chunks == ["kept"]
    assert trainer.model.training


def test_contrastive_training_teaches_retrieval(tmp_path):
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randperm(100, generator=draw).view(50, 2) + 1
    data = [
        {"input_ids": [a, a, a, 101], "labels": [-100, -100, -100, 101], "context_chunks": [[b, b, b]], "positive": 0}
        for a, b in pairs.tolist()
    ]
    settings = {"batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 60, "memory_warmup_steps": 0}
    scores = {}
    for weight in (0.0, 1.0):
        trainer = RAGTrainer(
            model(),
            config(tmp_path, **settings, save_steps=0, position_recall_steps=0, contrastive_weight=weight),
            data,
        )
        trainer.train()
        scores[weight] = trainer.evaluate(data)["recall@1"]
    assert scores[1.0] > 0.9
    assert scores[1.0] > scores[0.0] + 0.3


def test_phase_three_asks_every_position_equally_often():
    asked = [item["positive"] for item in recall_items(8, 4, seed=1)]
    assert sorted(asked) == [0, 0, 1, 1, 2, 2, 3, 3]
    item = recall_items(1, 4, seed=1)[0]
    fact = item["context_chunks"][item["positive"]]
    assert item["input_ids"][1] == fact[1]
    assert item["labels"] == [-100, -100, -100, fact[3]]


def test_the_order_of_the_data_follows_from_the_number_of_draws():
    whole = indices(5, seed=1, start=0)
    first = [next(whole) for _ in range(13)]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5))
    assert first[:5] != first[5:10]
    late = indices(5, seed=1, start=7)
    assert [next(late) for _ in range(6)] == first[7:]


def test_a_positive_may_be_given_as_the_chunk():
    item = {"input_ids": [1, 2], "context_chunks": [[3, 4], [5, 6]]}
    assert collate([{**item, "positive": [5, 6]}], 0).positives == [1]
    added = collate([{**item, "positive": torch.tensor([7])}], 0)
    assert added.positives == [2]
    assert added.chunks[0][2] == [7]
    assert collate([item, {**item, "positive": -1}], 0).positives == [-1, -1]


def test_tensorboard_curves(tmp_path):
    pytest.importorskip("tensorboard")
    RAGTrainer(model(), config(tmp_path, tensorboard=True, save_steps=0), items()).train()
    assert list((tmp_path / "runs").glob("events*"))


def test_configuration_files_and_bad_values(tmp_path):
    given = config(tmp_path)
    given.to_yaml(tmp_path / "config.yaml")
    assert RAGTrainingConfig.from_yaml(tmp_path / "config.yaml") == given
    defaults = RAGTrainingConfig()
    assert (defaults.batch_size, defaults.gradient_accumulation_steps, defaults.max_steps) == (8, 4, 50000)
    assert RAGTrainingConfig.from_yaml("learning_rate: 1e-4\nbatch_size: 2\n").learning_rate == 1e-4
    for change, named in (
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"min_learning_rate": 1.0}, "min_learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"memory_dropout": 2.0}, "memory_dropout"),
    ):
        with pytest.raises(ValueError, match=named):
            config(tmp_path, **change)
    with pytest.raises(ValueError, match="train_dataset"):
        RAGTrainer(model(), given, [])
    with pytest.raises(ValueError, match="positive"):
        collate([{"input_ids": [1], "context_chunks": [[2]], "positive": 1}], 0)
    with pytest.raises(ValueError, match="labels"):
        collate([{"input_ids": [1, 2], "labels": [1], "context_chunks": []}], 0)
