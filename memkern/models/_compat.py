"""What differs between the releases of transformers 5, in one place, and what all our outputs share."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

init: Any
try:  # skips what a checkpoint has loaded already
    init = importlib.import_module("transformers.initialization")
except ImportError:  # 5.0
    init = nn.init

__all__ = ["CACHE", "DictOutput", "causal_mask", "given_cache", "init"]

_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}

#: What this release calls the key-value cache, as an argument and as a field of an output.
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"

_MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)


def given_cache(past_key_values: Any, cache: Any) -> Any:
    """The key-value cache under whichever of its two names the caller used."""
    return cache if cache is not None else past_key_values


def causal_mask(config: Any, embeddings: Tensor, attention_mask: Tensor | None, cache: Any, position_ids: Any) -> Any:
    """transformers' causal mask in the form that ``config``'s attention implementation takes."""
    arguments = {
        "config": config,
        "inputs_embeds": embeddings,
        "input_embeds": embeddings,
        "attention_mask": attention_mask,
        "cache": cache,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    if "cache_position" in _MASK_ARGUMENTS:
        import torch

        start = 0 if cache is None else cache.get_seq_length()
        arguments["cache_position"] = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)
    return create_causal_mask(**{name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS})


class DictOutput:
    """Mixed into an output class: a field that is absent answers ``output["loss"]`` with None, not with a KeyError."""

    def __getitem__(self, key: Any) -> Any:
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        if isinstance(key, str) and key in names and key not in self.keys():  # type: ignore[attr-defined]
            return None
        return super().__getitem__(key)  # type: ignore[misc]
