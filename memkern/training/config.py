"""Settings of a training run of the XLNet models: what, on which data, how long, in which stages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from memkern.data.loader import STRATEGIES
from memkern.training.config_file import ConfigFile

READ_INJECTIONS = ("input", "head", "both")
MEMORY_UPDATES = ("gated", "none", "replace")
INIT_STRATEGIES = ("learned", "zeros", "uniform", "orthogonal")
STAGE_FIELDS = ("segments", "num_epochs", "num_memory_heads", "memory_slots", "memory_num_tokens", "num_memory_experts")
# Fields of earlier files that mean nothing here: hubs, caches and trackers that this trainer does not know.
_RETIRED = ("hub_", "chunked_", "use_wandb", "wandb_", "use_hub_", "use_chunked_", "use_lazy_", "use_streaming")
_RETIRED_NAMES = ("cache_dir", "push_to_hub_on_save", "force_reprocess", "streaming_chunk_size", "max_memory_gb")


@dataclass
class TrainingConfig(ConfigFile):
    """Settings of :class:`memkern.training.XLNetRecurrentTrainer`; batches count documents, not segments.

    A model comes from ``model_name`` (a folder, or a name where a network is), or with ``base_config`` (fields of
    ``XLNetConfig``) from a random start. A tokenizer comes from ``tokenizer_name``, else from the model's folder, else
    it is trained on the training data. ``max_steps`` counts optimiser steps over all stages and takes the place of
    ``num_epochs`` in the last one.

    Raises:
        ValueError: a field out of range or of an unknown choice, by name.
    """

    model_name: str = "xlnet-base-cased"
    base_config: dict[str, Any] | None = None
    tokenizer_name: str | None = None
    tokenizer_vocab_size: int = 4000

    dataset_name: str = "squad_v2"
    train_split: str = "train"
    eval_split: str = "validation"
    train_file: str | None = None
    eval_file: str | None = None
    join_articles: bool = False
    on_bad_answer: str = "raise"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_seq_length: int = 384
    doc_stride: int = 128
    max_n_segs: int | None = None
    progressive_segments: list[int] | None = None
    progressive_stages: list[dict[str, Any]] | None = None
    segment_selection_strategy: str = "answer_centered"
    segment_selection_seed: int = 42

    num_epochs: int = 3
    max_steps: int | None = None
    train_batch_size: int = 4
    eval_batch_size: int = 4
    learning_rate: float = 3e-5
    memory_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 2
    bptt_segments: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 42
    fp16: bool = field(default_factory=torch.cuda.is_available)
    bf16: bool = False
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    eval_steps: int = 500
    save_steps: int = 1000
    logging_steps: int = 100
    output_dir: str = "./outputs"
    run_name: str = "memkern"
    save_total_limit: int | None = 3
    tensorboard: bool = True
    progress_bar: bool = True

    no_answer_threshold: float = 0.0
    use_any_positive_logic: bool = True
    use_global_softmax: bool = True
    max_answer_length: int = 30
    warmup_freeze_base_epochs: int = 1
    warmup_disable_global_softmax_epochs: int = 1
    warmup_disable_any_positive_epochs: int = 1

    memory_num_tokens: int = 32
    memory_update: str = "gated"
    memory_init: str = "learned"
    memory_impl: str = "token"
    memory_tokens_in_text: bool = False
    read_injection: str = "both"
    memory_backend: str | None = None
    use_differentiable_memory: bool = False
    num_memory_heads: int = 1
    memory_sharpness: float = 1.0
    enable_usage_tracking: bool = False
    enable_temporal_links: bool = False
    memory_slots: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            *((n, 1) for n in ("tokenizer_vocab_size", "max_seq_length", "num_epochs", "train_batch_size")),
            *((n, 1) for n in ("eval_batch_size", "gradient_accumulation_steps", "num_memory_heads", "logging_steps")),
            *((n, 1) for n in ("eval_steps", "save_steps", "max_answer_length")),
            *((n, 0) for n in ("doc_stride", "memory_num_tokens", "seed", "warmup_freeze_base_epochs")),
            *((n, 0) for n in ("warmup_disable_global_softmax_epochs", "warmup_disable_any_positive_epochs")),
        ):
            _integer(name, getattr(self, name), least)
        for name in ("max_train_samples", "max_eval_samples", "max_n_segs", "max_steps", "bptt_segments"):
            _optional_integer(name, getattr(self, name))
        for name in ("memory_slots", "save_total_limit"):
            _optional_integer(name, getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "memory_sharpness"):
            _number(name, getattr(self, name), above=0)
        if self.memory_learning_rate is not None:
            _number("memory_learning_rate", self.memory_learning_rate, above=0)
        _number("weight_decay", self.weight_decay, least=0)
        _number("warmup_ratio", self.warmup_ratio, least=0, most=1)
        _choice("segment_selection_strategy", self.segment_selection_strategy, STRATEGIES)
        _choice("on_bad_answer", self.on_bad_answer, ("raise", "skip"))
        _choice("memory_update", self.memory_update, MEMORY_UPDATES)
        _choice("memory_init", self.memory_init, ("learned", "zeros"))
        _choice("memory_impl", self.memory_impl, ("token",))
        _choice("read_injection", self.read_injection, READ_INJECTIONS)
        if self.fp16 and self.bf16:
            raise ValueError("fp16: expected at most one of fp16 and bf16, got both")
        if self.progressive_segments is not None and self.progressive_stages is not None:
            raise ValueError("progressive_stages: expected at most one of it and progressive_segments, got both")
        for count in self.progressive_segments or []:
            _integer("progressive_segments", count, 1)
        for number, stage in enumerate(self.progressive_stages or []):
            for name, value in stage.items():
                _choice(f"progressive_stages[{number}]", name, STAGE_FIELDS)
                _integer(f"progressive_stages[{number}].{name}", value, 1)
            if self.memory_tokens_in_text and "memory_num_tokens" in stage:
                raise ValueError(
                    f"progressive_stages[{number}].memory_num_tokens: cannot change with memory_tokens_in_text"
                )

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What each stage changes; one stage that changes nothing where no list is given."""
        if self.progressive_stages is not None:
            return self.progressive_stages
        return [{"segments": count} for count in self.progressive_segments or []] or [{}]

    @property
    def memory_type(self) -> str:
        """ "standard", "token", "differentiable" or "gmm"."""
        if self.use_differentiable_memory:
            return "differentiable"
        return "token" if self.memory_num_tokens else "standard"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As :meth:`ConfigFile.from_dict`; fields of earlier files without a meaning here are dropped, with a warning.

        ``memory_type`` may be there and has to agree with the other fields.
        """
        given = dict(values)
        retired = [name for name in given if name in _RETIRED_NAMES or name.startswith(_RETIRED)]
        if retired:
            warnings.warn(f"{cls.__name__}: left out {', '.join(retired)}, which mean nothing here", stacklevel=2)
        claimed = given.pop("memory_type", None)
        config = super().from_dict({name: value for name, value in given.items() if name not in retired})
        if claimed is not None and claimed != config.memory_type:
            raise ValueError(f"memory_type: the other fields make it {config.memory_type!r}, got {claimed!r}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, and ``memory_type``."""
        return super().to_dict() | {"memory_type": self.memory_type}

    def replaced(self, **changes: Any) -> Self:
        """A copy with other fields, checked again."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**(own | changes))


@dataclass
class GMMTrainingConfig(TrainingConfig):
    """Adds the mixture of expert memories; each expert has ``memory_slots`` or else ``memory_num_tokens`` slots.

    ``expert_init_strategies`` None is "learned" for every expert. Checks of these fields run with
    ``use_gmm_memory`` only.
    """

    use_gmm_memory: bool = False
    num_memory_experts: int = 4
    max_experts: int = 8
    routing_temperature: float = 1.0
    routing_mode: str = "write-based"
    pooling_method: str = "mean"
    entropy_regularization_weight: float = 0.0
    load_balance_weight: float = 0.01
    expert_init_strategies: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_gmm_memory:
            return
        most = max(self.max_experts, 8)
        if (
            isinstance(self.num_memory_experts, bool)
            or not isinstance(self.num_memory_experts, int)
            or not 2 <= self.num_memory_experts <= most
        ):
            raise ValueError(f"num_memory_experts must be in [2, {most}], got {self.num_memory_experts!r}")
        _number("routing_temperature", self.routing_temperature, above=0)
        _number("entropy_regularization_weight", self.entropy_regularization_weight, least=0)
        _number("load_balance_weight", self.load_balance_weight, least=0)
        _choice("routing_mode", self.routing_mode, ("write-based", "read-based"))
        _choice("pooling_method", self.pooling_method, ("mean", "max", "attention"))
        if not 1 <= self.memory_num_tokens <= 32:
            raise ValueError(f"memory_num_tokens must be in [1, 32] with GMM memory, got {self.memory_num_tokens}")
        if self.use_differentiable_memory:
            raise ValueError("use_differentiable_memory: expected False with use_gmm_memory, got True")
        if self.expert_init_strategies is None:
            self.expert_init_strategies = ["learned"] * self.num_memory_experts
        if len(self.expert_init_strategies) != self.num_memory_experts:
            raise ValueError(
                f"expert_init_strategies must have length num_memory_experts ({self.num_memory_experts}), "
                f"got {len(self.expert_init_strategies)}"
            )
        for strategy in self.expert_init_strategies:
            _choice("expert_init_strategies", strategy, INIT_STRATEGIES)

    @property
    def memory_type(self) -> str:
        """ "gmm" with ``use_gmm_memory``, else as :class:`TrainingConfig`."""
        return "gmm" if self.use_gmm_memory else super().memory_type


def _preset(experts: int, changes: Mapping[str, Any]) -> GMMTrainingConfig:
    return GMMTrainingConfig(
        **({"use_gmm_memory": True, "num_memory_experts": experts, "memory_num_tokens": 16} | dict(changes))
    )


def gmm_small_config(**changes: Any) -> GMMTrainingConfig:
    """Two experts of 16 slots; any field may be changed."""
    return _preset(2, changes)


def gmm_balanced_config(**changes: Any) -> GMMTrainingConfig:
    """Four experts of 16 slots; any field may be changed."""
    return _preset(4, changes)


def gmm_large_config(**changes: Any) -> GMMTrainingConfig:
    """Eight experts of 16 slots; any field may be changed."""
    return _preset(8, changes)


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _optional_integer(name: str, value: Any) -> None:
    if value is not None:
        _integer(name, value, 1)


def _number(
    name: str, value: Any, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if not good or not (
        (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    ):
        wanted = f"> {above}" if above is not None else f">= {least}" + (f" and <= {most}" if most is not None else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
