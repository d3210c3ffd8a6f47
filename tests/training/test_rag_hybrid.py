"""Training a hybrid model: segments with state, the bank of the batch's context, gates in the curves."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig


def model():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return HybridTransformerModel(
        HybridTransformerConfig(text, memory_slots=4, external_memory_size=256, use_gated_retrieval=True)
    )


def items(count=4):
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 64, (9 + i % 3,), generator=draw),
            "context_chunks": [torch.randint(1, 64, (5 + i,), generator=draw).tolist() for _ in range(2)],
        }
        for i in range(count)
    ]


def config(folder, **changes):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "max_steps": 4,
        "memory_warmup_steps": 1,
        "segment_length": 4,
        "output_dir": str(folder),
        "save_steps": 2,
        "eval_steps": 0,
        "logging_steps": 1,
        "progress_bar": False,
    }
    return HybridTrainingConfig(**{**settings, **changes})


def test_segments_add_up_to_one_pass_without_memory(tmp_path):
    trained = model()
    batch_of = HybridTrainer(trained, config(tmp_path), items()).collate(items(2))
    whole = HybridTrainer(trained, config(tmp_path, segment_length=None), items()).forward(batch_of, 1)
    plain = trained(batch_of.input_ids, labels=batch_of.labels, attention_mask=batch_of.attention_mask)
    torch.testing.assert_close(whole.loss, plain.loss)
    # Cut into single tokens and with memories at their neutral start, only the state differs: none, so far.
    state_free = [
        trained(batch_of.input_ids[:, t : t + 1]).logits[:, 0].log_softmax(-1)
        for t in range(batch_of.input_ids.shape[1])
    ]
    single = HybridTrainer(trained, config(tmp_path, segment_length=1), items()).forward(batch_of, 1)
    labels = batch_of.labels[:, 1:]
    terms = [
        state_free[t].gather(1, labels[:, t : t + 1].clamp(min=0))[labels[:, t] >= 0] for t in range(labels.shape[1])
    ]
    expected = -torch.cat(terms).mean()
    torch.testing.assert_close(single.loss, expected)


def test_training_fills_the_bank_by_row_and_logs_the_gates(tmp_path):
    trainer = HybridTrainer(model(), config(tmp_path), items())
    state = trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in state.log_history)
    assert all(0 < entry["gate/layer_0"] < 1 for entry in state.log_history)
    assert state.log_history[0]["gate/layer_0"] != state.log_history[-1]["gate/layer_0"]
    bank = trainer.model.external_memory
    assert set(bank._documents[: bank._used].tolist()) == {0, 1}
    found = trainer.evaluate(items())
    assert found["eval_loss"] != found["eval_loss_without_memory"]
    assert trainer.model.external_memory is bank


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = HybridTrainer(model(), config(tmp_path / "a"), items())
    whole.train()
    resumed = HybridTrainer(model(), config(tmp_path / "b"), items())
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("every", [1, None])
def test_bptt_is_bounded_by_segments(tmp_path, every):
    trained = model()
    with torch.no_grad():
        for layer in trained.memory_layers.values():
            layer.internal_proj.weight.normal_()
    trainer = HybridTrainer(trained, config(tmp_path, bptt_segments=every), items())
    trainer.model.train()
    trainer.forward(trainer.collate(items(2)), 1).loss.backward()
    reached = trained.memory_layers["0"].internal.update_proj.weight.grad.abs().sum() > 0
    assert bool(reached) is (every is None)


def test_bad_values_are_named(tmp_path):
    for change, named in (({"segment_length": 0}, "segment_length"), ({"position_recall_steps": 1}, "position_recall")):
        with pytest.raises(ValueError, match=named):
            config(tmp_path, **change)
