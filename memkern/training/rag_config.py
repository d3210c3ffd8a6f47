"""Settings of a Self-RAG or hybrid training run."""

from __future__ import annotations

from dataclasses import dataclass, fields

from memkern.training.config_file import ConfigFile


@dataclass
class RAGTrainingConfig(ConfigFile):
    """How :class:`memkern.training.RAGTrainer` trains; every limit counts optimiser steps.

    Args:
        batch_size, gradient_accumulation_steps: rows of a micro-batch; micro-batches of a step.
        learning_rate, min_learning_rate, warmup_steps: linear warm-up, then a cosine down to the minimum.
        max_steps: all steps, the phases together.
        weight_decay, beta1, beta2, max_grad_norm: of AdamW and of clipping.
        memory_warmup_steps: phase one, without memory.
        position_recall_steps: phase three, at the end: facts at every position, each asked equally often.
        position_recall_facts: facts of a stream there.
        memory_populate_batch: clear the store and fill it with the batch's context before each micro-batch; False
            searches the store as it is.
        share_batch_memory: rows of a batch may retrieve each other's context; False keeps each to its own.
        contrastive_weight, memory_dropout: replace the model's own when given.
        output_dir, save_steps, save_total_limit: where and how often checkpoints go, how many stay; 0 steps for never.
        eval_steps, logging_steps: how often; 0 for never.
        bf16: autocast to bfloat16.
        tensorboard: curves under ``output_dir/runs``.
        progress_bar: show one.
        seed: of the order of the data, dropout and recall streams.

    Raises:
        ValueError: a field out of range, named.
    """

    batch_size: int = 8
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 500
    max_steps: int = 50000
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    memory_warmup_steps: int = 1000
    position_recall_steps: int = 0
    position_recall_facts: int = 32
    memory_populate_batch: bool = True
    share_batch_memory: bool = True
    contrastive_weight: float | None = None
    memory_dropout: float | None = None
    output_dir: str = "./outputs"
    save_steps: int = 1000
    save_total_limit: int | None = 3
    eval_steps: int = 500
    logging_steps: int = 50
    bf16: bool = False
    tensorboard: bool = False
    progress_bar: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "position_recall_facts": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None") and value is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ValueError(f"{field.name}: expected an int, got {value!r}")
                if field.name != "seed" and value < least.get(field.name, 0):
                    raise ValueError(f"{field.name}: expected at least {least.get(field.name, 0)}, got {value}")
            elif field.type in ("float", "float | None") and value is not None:
                setattr(self, field.name, float(value))  # YAML reads 1e-4 as text
                if getattr(self, field.name) < 0:
                    raise ValueError(f"{field.name}: expected at least 0, got {value}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: expected above 0, got {self.learning_rate}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected at most learning_rate={self.learning_rate}, got {self.min_learning_rate}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if self.memory_dropout is not None and self.memory_dropout > 1:
            raise ValueError(f"memory_dropout: expected 0 to 1, got {self.memory_dropout}")

    def phase(self, step: int) -> int:
        """Which phase the step (counted from 0) belongs to: 1 without memory, 2 with it, 3 position recall."""
        if step >= self.max_steps - self.position_recall_steps:
            return 3
        return 1 if step < self.memory_warmup_steps else 2
