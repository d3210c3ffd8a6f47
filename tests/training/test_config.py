"""Training configurations: defaults, files, checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memkern.training import (
    GMMTrainingConfig,
    TrainingConfig,
    gmm_balanced_config,
    gmm_large_config,
    gmm_small_config,
)


def test_defaults() -> None:
    config = TrainingConfig()
    expected = {
        "model_name": "xlnet-base-cased",
        "max_seq_length": 384,
        "doc_stride": 128,
        "num_epochs": 3,
        "train_batch_size": 4,
        "learning_rate": 3e-5,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2,
        "eval_steps": 500,
        "save_steps": 1000,
        "logging_steps": 100,
        "save_total_limit": 3,
        "memory_num_tokens": 32,
        "memory_update": "gated",
        "segment_selection_seed": 42,
        "bptt_segments": None,
        "max_steps": None,
        "seed": 42,
        "gradient_checkpointing": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.fp16 == torch.cuda.is_available()
    assert config.stages == [{}]
    assert config.memory_type == "token"
    assert TrainingConfig(memory_num_tokens=0).memory_type == "standard"
    assert TrainingConfig(use_differentiable_memory=True).memory_type == "differentiable"
    assert TrainingConfig(progressive_segments=[2, 4]).stages == [{"segments": 2}, {"segments": 4}]


def test_gmm_fields_and_presets() -> None:
    off = GMMTrainingConfig(num_memory_experts=100)
    assert (off.use_gmm_memory, off.expert_init_strategies, off.memory_type) == (False, None, "token")
    for preset, experts in ((gmm_small_config, 2), (gmm_balanced_config, 4), (gmm_large_config, 8)):
        config = preset(num_epochs=1)
        assert config.use_gmm_memory
        assert (config.num_memory_experts, config.num_epochs, config.load_balance_weight) == (experts, 1, 0.01)
        assert config.expert_init_strategies == ["learned"] * experts
        assert config.to_dict()["memory_type"] == "gmm"
    for experts in (3, 5, 6, 7):
        assert gmm_small_config(num_memory_experts=experts).num_memory_experts == experts
    assert gmm_small_config(num_memory_experts=16, max_experts=16).num_memory_experts == 16


@pytest.mark.parametrize("kind", [TrainingConfig, gmm_balanced_config])
def test_files_bring_everything_back(kind: Any, tmp_path: Path) -> None:
    config = kind(progressive_stages=[{"segments": 2, "memory_slots": 16}], learning_rate=1e-4, run_name="näme")
    again = type(config)
    assert again.from_dict(config.to_dict()) == config
    assert again.from_json(config.to_json()) == config
    assert again.from_yaml(config.to_yaml()) == config
    for name in ("c.json", "c.yaml"):
        path = tmp_path / "deep" / name
        (config.to_json if name.endswith("json") else config.to_yaml)(path)
        assert again.from_file(path) == config
    assert config.replaced(seed=7).seed == 7
    assert config.seed == 42


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown fields 'learning_rates'; did you mean learning_rate"):
        TrainingConfig.from_dict({"learning_rates": 1})
    with pytest.raises(ValueError, match="memory_type: the other fields make it 'token', got 'gmm'"):
        TrainingConfig.from_dict({"memory_type": "gmm"})
    with pytest.warns(UserWarning, match="left out hub_model_id, use_wandb, cache_dir"):
        config = TrainingConfig.from_dict({"hub_model_id": "x", "use_wandb": True, "cache_dir": ".", "num_epochs": 2})
    assert config.num_epochs == 2
    path = tmp_path / "c.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"c\.yaml: expected a mapping of fields, got list"):
        TrainingConfig.from_file(path)
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match=r"c\.yaml: cannot be read"):
        TrainingConfig.from_yaml(path)
    with pytest.raises(ValueError, match=r"c\.toml: expected a file that ends in"):
        TrainingConfig.from_file(tmp_path / "c.toml")
    with pytest.raises(FileNotFoundError):
        TrainingConfig.from_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 0}, "num_epochs: expected an integer of at least 1, got 0"),
        ({"train_batch_size": 2.5}, "train_batch_size: expected an integer"),
        ({"learning_rate": 0}, "learning_rate must be > 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be >= 0 and <= 1, got 1.5"),
        ({"memory_update": "sometimes"}, "memory_update: expected one of gated, none, replace, got 'sometimes'"),
        ({"segment_selection_strategy": "x"}, "segment_selection_strategy: expected one of"),
        ({"read_injection": "tail"}, "read_injection: expected one of input, head, both"),
        ({"bptt_segments": 0}, "bptt_segments: expected an integer of at least 1, got 0"),
        ({"fp16": True, "bf16": True}, "fp16: expected at most one of fp16 and bf16"),
        ({"progressive_segments": [2, 0]}, "progressive_segments: expected an integer of at least 1, got 0"),
        ({"progressive_segments": [2], "progressive_stages": [{}]}, "progressive_stages: expected at most one"),
        ({"progressive_stages": [{"heads": 2}]}, r"progressive_stages\[0\]: expected one of segments"),
    ],
)
def test_checks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_memory_experts": 1}, r"num_memory_experts must be in \[2, 8\], got 1"),
        ({"num_memory_experts": 9}, r"num_memory_experts must be in \[2, 8\], got 9"),
        ({"num_memory_experts": 4.0}, r"num_memory_experts must be in"),
        ({"routing_temperature": 0}, "routing_temperature must be > 0"),
        ({"routing_mode": "both"}, "routing_mode: expected one of write-based, read-based"),
        ({"load_balance_weight": -1}, "load_balance_weight must be >= 0"),
        ({"entropy_regularization_weight": -1}, "entropy_regularization_weight must be >= 0"),
        ({"memory_num_tokens": 33}, r"memory_num_tokens must be in \[1, 32\]"),
        ({"memory_num_tokens": 0}, r"memory_num_tokens must be in \[1, 32\]"),
        ({"expert_init_strategies": ["zeros"]}, "expert_init_strategies must have length"),
        ({"expert_init_strategies": ["zeros", "random", "zeros", "zeros"]}, "expert_init_strategies: expected one of"),
        ({"use_differentiable_memory": True}, "use_differentiable_memory: expected False"),
    ],
)
def test_gmm_checks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gmm_balanced_config(**changes)
