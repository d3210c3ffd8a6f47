"""Tiny random XLNets, and documents of several segments for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import XLNetConfig, XLNetForQuestionAnsweringSimple

WIDTH, LENGTH, BATCH = 32, 12, 3


@pytest.fixture
def base_config() -> XLNetConfig:
    return XLNetConfig(vocab_size=60, d_model=WIDTH, n_layer=2, n_head=4, d_inner=48)


@pytest.fixture
def base(base_config: XLNetConfig) -> XLNetForQuestionAnsweringSimple:
    torch.manual_seed(0)
    return XLNetForQuestionAnsweringSimple(base_config).eval()


def segment(seed: int = 0, *, labels: bool = True, padding: int = 0, batch: int = BATCH) -> dict[str, Any]:
    """Inputs of one segment, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {
        "input_ids": torch.randint(5, 60, (batch, LENGTH), generator=generator),
        "attention_mask": torch.ones(batch, LENGTH, dtype=torch.long),
        "token_type_ids": torch.zeros(batch, LENGTH, dtype=torch.long),
    }
    made["token_type_ids"][:, LENGTH // 2 :] = 1
    if labels:
        made["start_positions"] = torch.randint(0, LENGTH, (batch,), generator=generator)
        made["end_positions"] = torch.randint(0, LENGTH, (batch,), generator=generator)
    if padding:
        for name, filler in (("input_ids", 5), ("attention_mask", 0), ("token_type_ids", 3)):
            made[name] = torch.cat([torch.full((batch, padding), filler), made[name]], 1)
    return made


def awake(model: Any, seed: int = 1) -> Any:
    """The model with every projection that starts at zero moved off it, so that memory reaches every logit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.memory_named_parameters():
            if "memory_fusion.output" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model
