"""The recurrent trainer: it learns, resumes bit for bit, changes sizes between stages, and runs in two processes."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memkern.data.squad import SquadExample
from memkern.testing import distributed
from memkern.training import GMMTrainingConfig, TrainingConfig, gmm_small_config

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from memkern.training import XLNetRecurrentTrainer
from memkern.training.checkpoints import checkpoints

Settings = Callable[..., dict[str, Any]]
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"memory_num_tokens": 0},
    "token": {},
    "differentiable": {"use_differentiable_memory": True, "num_memory_heads": 2, "memory_slots": 4},
    "gmm": {"use_gmm_memory": True, "num_memory_experts": 2},
}


def trainer_for(config: TrainingConfig, questions: list[SquadExample], evaluates: bool = True) -> XLNetRecurrentTrainer:
    return XLNetRecurrentTrainer(config, train_dataset=questions, eval_dataset=questions if evaluates else None)


def weights(trainer: XLNetRecurrentTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("kind", KINDS)
def test_every_memory_type_trains_and_evaluates(kind: str, questions: list[SquadExample], settings: Settings) -> None:
    config = GMMTrainingConfig(**settings(num_epochs=1, **KINDS[kind]))
    assert config.memory_type == kind
    trainer = trainer_for(config, questions)
    assert trainer.model.memory_type == kind
    before = weights(trainer)
    state = trainer.train()
    assert state.global_step == 4
    assert [entry["step"] for entry in state.log_history] == [1, 2, 3, 4]
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in state.log_history)
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert any(trainer.model.is_memory_parameter(name) for name in moved) == (kind != "standard")
    scores = trainer.evaluate()
    assert {"exact", "f1", "total", "HasAns_f1", "NoAns_f1", "best_f1"} <= scores.keys()
    assert scores["total"] == len(questions)


def test_it_learns(questions: list[SquadExample], settings: Settings) -> None:
    fields = settings(num_epochs=10, learning_rate=2e-2, save_steps=1000, eval_steps=20, logging_steps=8)
    trainer = trainer_for(TrainingConfig(**fields), questions)
    state = trainer.train()
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert (Path(fields["output_dir"]) / "best_model" / "model.safetensors").is_file()
    assert state.best_metric == max(entry["eval_f1"] for entry in state.log_history if "eval_f1" in entry)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    changes: dict[str, Any], questions: list[SquadExample], settings: Settings, tmp_path: Path
) -> None:
    fields = settings(save_total_limit=None, use_gmm_memory=True, num_memory_experts=2, logging_steps=3, **changes)
    whole = trainer_for(GMMTrainingConfig(**fields), questions)
    whole.train()
    found = checkpoints(fields["output_dir"])
    assert [path.name for path in found][:2] == ["checkpoint-2", "checkpoint-4"]
    again = trainer_for(GMMTrainingConfig(**(fields | {"output_dir": str(tmp_path / "again")})), questions)
    torch.rand(5)  # generators that stand elsewhere do not matter
    again.train(resume_from_checkpoint=found[0])
    assert_equal(weights(whole), weights(again))
    assert again.state.log_history == whole.state.log_history


def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(
    questions: list[SquadExample], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = settings(memory_num_tokens=1)
    whole = trainer_for(TrainingConfig(**(fields | {"output_dir": str(tmp_path / "whole")})), questions)
    whole.train()
    cut = trainer_for(TrainingConfig(**fields), questions)
    step, count = torch.optim.AdamW.step, []

    def dies(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(fields["output_dir"])] == ["checkpoint-2"]
    again = trainer_for(TrainingConfig(**fields), questions)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))


def test_a_given_model_is_trained_and_resumed_in_place(
    questions: list[SquadExample], settings: Settings, tmp_path: Path
) -> None:
    made = trainer_for(GMMTrainingConfig(**settings(use_gmm_memory=True, num_memory_experts=2)), questions)
    models = [made.model, copy.deepcopy(made.model)]
    fields = settings(max_steps=9, save_steps=6)  # more than the epochs have; says nothing of a GMM
    for model, resume in zip(models, (None, tmp_path / "run" / "checkpoint-6"), strict=True):
        config = TrainingConfig(**fields)
        trainer = XLNetRecurrentTrainer(config, model=model, tokenizer=made.tokenizer, train_dataset=questions)
        assert trainer.train(resume_from_checkpoint=resume).global_step == 9
        assert trainer.model is model
    assert_equal(*(dict(model.state_dict()) for model in models))


def test_only_the_newest_checkpoints_stay(questions: list[SquadExample], settings: Settings) -> None:
    fields = settings(save_steps=1, save_total_limit=2, max_steps=5)
    trainer_for(TrainingConfig(**fields), questions).train()
    assert [path.name for path in checkpoints(fields["output_dir"])] == ["checkpoint-4", "checkpoint-5"]
    saved = json.loads((Path(fields["output_dir"]) / "checkpoint-5" / "training_config.json").read_text())
    assert TrainingConfig.from_dict(saved) == TrainingConfig(**fields)


def test_stages_change_segments_heads_and_slots(questions: list[SquadExample], settings: Settings) -> None:
    stages = [
        {"segments": 1, "num_memory_heads": 1, "memory_slots": 4, "num_epochs": 1},
        {"segments": 2, "num_memory_heads": 2, "memory_slots": 6, "num_epochs": 1},
    ]
    fields = settings(progressive_stages=stages, use_differentiable_memory=True, save_steps=6, save_total_limit=None)
    trainer = trainer_for(TrainingConfig(**fields), questions, evaluates=False)
    state = trainer.train()
    output = Path(fields["output_dir"])
    assert [entry["stage"] for entry in state.log_history] == [0] * 4 + [1] * 4
    assert (trainer.model.config.num_memory_heads, trainer.model.config.memory_slots) == (2, 6)
    first = type(trainer.model).from_pretrained(output / "stage_0_segs_1")
    assert (first.config.num_memory_heads, first.config.memory_slots) == (1, 4)
    # At the second stage's start its model has the first one's backbone and the overlap of its memory.
    fresh = trainer_for(TrainingConfig(**fields), questions, evaluates=False)
    fresh.model = first
    fresh._prepare_model(1)
    assert_equal(dict(first.transformer.state_dict()), dict(fresh.model.transformer.state_dict()))
    one, two = dict(first.memory_named_parameters()), dict(fresh.model.memory_named_parameters())
    name = next(name for name in one if "write_keys" in name and name.endswith("weight"))
    assert two[name].shape[0] == 2 * one[name].shape[0]
    assert torch.equal(two[name][: one[name].shape[0]], one[name])
    resumed = trainer_for(TrainingConfig(**fields), questions, evaluates=False)
    resumed.train(resume_from_checkpoint=output / "checkpoint-6")
    assert_equal(weights(trainer), weights(resumed))


def test_phases(questions: list[SquadExample], settings: Settings) -> None:
    fields = settings(
        num_epochs=2, warmup_freeze_base_epochs=1, warmup_disable_global_softmax_epochs=1, save_steps=4,
        save_total_limit=None, weight_decay=0.1,
    )  # fmt: skip
    trainer = trainer_for(TrainingConfig(**fields), questions, evaluates=False)
    before = weights(trainer)
    state = trainer.train()
    assert [entry["whole_documents"] for entry in state.log_history] == [False] * 4 + [True] * 4
    from safetensors.torch import load_file

    after = load_file(Path(fields["output_dir"]) / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("transformer."))
    assert not torch.equal(after["qa_outputs.weight"], before["qa_outputs.weight"])
    assert not torch.equal(
        weights(trainer)["transformer.word_embedding.weight"], before["transformer.word_embedding.weight"]
    )


def test_curves_for_tensorboard(questions: list[SquadExample], settings: Settings) -> None:
    pytest.importorskip("tensorboard")
    fields = settings(max_steps=2, tensorboard=True, progress_bar=True)
    trainer_for(TrainingConfig(**fields), questions, evaluates=False).train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(Path(fields["output_dir"]) / "runs"))
    curves.Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == [1, 2]


def test_memory_tokens_in_the_text_change_nothing(
    questions: list[SquadExample], settings: Settings, tmp_path: Path
) -> None:
    losses = []
    for in_text, length in ((False, 40), (True, 44)):
        fields = settings(
            memory_tokens_in_text=in_text, max_seq_length=length, max_steps=1, output_dir=str(tmp_path / str(in_text))
        )
        fields["base_config"] = fields["base_config"] | {"dropout": 0.0, "vocab_size": 140}
        trainer = trainer_for(TrainingConfig(**fields), questions, evaluates=False)
        assert (len(trainer.features()[0]["input_ids"]), trainer.predictor().memory_tokens is not None) == (
            length,
            in_text,
        )
        losses.append(trainer.train().log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_settings(questions: list[SquadExample], settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16: expected a GPU, got device 'cpu'"):
        trainer_for(TrainingConfig(**settings(fp16=True)), questions)
    with pytest.raises(ValueError, match="tokenizer_name: nothing to load from"):
        XLNetRecurrentTrainer(TrainingConfig(**settings(tokenizer_name=str(tmp_path))), train_dataset=questions)
    trainer = trainer_for(TrainingConfig(**settings()), questions)
    with pytest.raises(ValueError, match="resume_from_checkpoint: no checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a checkpoint folder"):
        trainer.train(resume_from_checkpoint=tmp_path)
    config = TrainingConfig(**settings(progressive_stages=[{"memory_num_tokens": 3}]))
    with pytest.raises(ValueError, match="progressive_stages: sizes of a given model cannot be changed"):
        XLNetRecurrentTrainer(config, model=trainer.model, tokenizer=trainer.tokenizer, train_dataset=questions)
    broken = [SquadExample("q", "Where?", "In Rome it was.", ("Oslo",), (3,))]
    with pytest.raises(ValueError, match="question 'q': answer 'Oslo' does not stand at 3"):
        trainer_for(gmm_small_config(**settings()), [*questions, *broken]).train()


# Adam moves a weight whose gradient is rounding as far as any other, so that two orders of summation part. With an eps
# far above the rounding it does not, and it tells a gradient from its double.
STEADY_ADAM = functools.partial(torch.optim.AdamW, eps=1e-3)


def train_on_two(rank: int, fields: dict[str, Any], questions: list[SquadExample], result: Path) -> None:
    # As torchrun does; the group is there, so that nobody meets at the address.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.optim.AdamW = STEADY_ADAM  # type: ignore[misc, assignment]
    trainer = trainer_for(GMMTrainingConfig(**fields), questions)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    scores = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        torch.save({"weights": trainer.model.state_dict(), "scores": scores}, result)


def test_two_processes_equal_one_that_accumulates(
    questions: list[SquadExample], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", STEADY_ADAM)
    # Eight documents of one batch size each: both runs see the same documents in every optimiser step.
    fields = settings(
        use_gmm_memory=True, num_memory_experts=2, load_balance_weight=0.0, train_batch_size=2, num_epochs=1,
        warmup_freeze_base_epochs=0,
    )  # fmt: skip
    fields["base_config"] = fields["base_config"] | {"dropout": 0.0}
    some = questions[:8]
    alone = trainer_for(GMMTrainingConfig(**(fields | {"gradient_accumulation_steps": 2})), some)
    alone.train()
    distributed.spawn(train_on_two, fields | {"output_dir": str(tmp_path / "two")}, some, tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    for name, value in weights(alone).items():
        torch.testing.assert_close(
            result["weights"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert result["scores"] == alone.evaluate()
