"""Model and tokenizer of a configuration: loaded where they are at hand, from a random start otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memkern.data import configure_memory_tokens, train_xlnet_tokenizer
from memkern.data.squad import SquadExample
from memkern.training.config import GMMTrainingConfig, TrainingConfig


def memory_options(config: TrainingConfig) -> dict[str, Any]:
    """The model arguments that the configuration's fields ask for."""
    options: dict[str, Any] = {
        "read_injection": config.read_injection,
        "memory_backend": config.memory_backend,
        "bptt_segments": config.bptt_segments,
    }
    if isinstance(config, GMMTrainingConfig) and config.memory_type == "gmm":
        return options | {
            "num_experts": config.num_memory_experts,
            "max_experts": config.max_experts,
            "memory_slots": config.memory_slots or config.memory_num_tokens,
            "routing_mode": config.routing_mode,
            "routing_temperature": config.routing_temperature,
            "pooling_method": config.pooling_method,
            "init_strategies": config.expert_init_strategies,
            "load_balance_weight": config.load_balance_weight,
            "entropy_regularization_weight": config.entropy_regularization_weight,
        }
    options |= {"mem_token_count": config.memory_num_tokens, "memory_init": config.memory_init}
    if config.memory_type == "differentiable":
        return options | {
            "use_differentiable_memory": True,
            "num_memory_heads": config.num_memory_heads,
            "memory_sharpness": config.memory_sharpness,
            "enable_usage_tracking": config.enable_usage_tracking,
            "enable_temporal_links": config.enable_temporal_links,
            "memory_slots": config.memory_slots,
        }
    return options | {"memory_update": config.memory_update}


def model_class(config: TrainingConfig) -> Any:
    """``GMMXLNetForQA`` or ``MemXLNetForQA``."""
    if config.memory_type == "gmm":
        from memkern.models.gmm_xlnet import GMMXLNetForQA

        return GMMXLNetForQA
    from memkern.models.memxlnet import MemXLNetForQA

    return MemXLNetForQA


def build_tokenizer(config: TrainingConfig, examples: Sequence[SquadExample]) -> Any:
    """The configuration's tokenizer, else one trained on the questions and passages of ``examples``.

    Raises:
        ValueError: neither a tokenizer nor examples are at hand.
    """
    source = config.tokenizer_name
    if source is None and config.base_config is None:
        source = config.model_name
    if source is not None:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer_name: nothing to load from {source!r} ({_first_line(error)}); give a folder, or "
                "base_config for a random start with a tokenizer trained on the data"
            ) from error
    if not examples:
        raise ValueError("tokenizer_name: expected a tokenizer to load, for there are no examples to train one on")
    texts = dict.fromkeys(example.context for example in examples)
    return train_xlnet_tokenizer([*texts, *(e.question for e in examples)], config.tokenizer_vocab_size)


def build_model(config: TrainingConfig, tokenizer: Any) -> Any:
    """A model of the configuration's memory type; with ``memory_tokens_in_text`` the tokenizer gains memory tokens.

    Weights of a random start are drawn from torch's global generator.

    Raises:
        ValueError: nothing to load under ``model_name``, or a checkpoint of another memory type.
    """
    options = memory_options(config)
    cls = model_class(config)
    if config.memory_tokens_in_text:
        slots = options["memory_slots"] if config.memory_type == "gmm" else config.memory_num_tokens
        options |= configure_memory_tokens(tokenizer, slots)
    if config.base_config is not None:
        from transformers import XLNetConfig

        model = cls(XLNetConfig(**({"vocab_size": len(tokenizer)} | config.base_config)), **options)
    else:
        try:
            model = cls.from_pretrained(config.model_name, **options)
        except OSError as error:
            hint = "" if Path(config.model_name).exists() else "; without a network give a folder, or base_config"
            raise ValueError(f"model_name: cannot load {config.model_name!r} ({_first_line(error)}){hint}") from error
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_model(folder: Path) -> Any:
    """A saved model of the class that its files name, ours or of the earlier layouts; plain XLNet has no memory."""
    from memkern.models.gmm_xlnet import GMMXLNetForQA
    from memkern.models.memxlnet import MemXLNetForQA

    path = folder / "config.json"
    kind = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    gmm = kind == "gmm_xlnet" or (folder / "gmm_config.json").is_file()
    return (GMMXLNetForQA if gmm else MemXLNetForQA).from_pretrained(folder)


def memory_tokens(model: Any) -> dict[str, list[int]] | None:
    """What the featuriser has to put behind the text; None where the model brings its memory tokens itself."""
    ids = {name: getattr(model.config, name, None) for name in ("mem_read_ids", "mem_write_ids")}
    if not any(ids.values()):
        return None
    return {name: list(value or []) for name, value in ids.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
