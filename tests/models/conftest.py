"""Tiny random XLNets, and segments for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import XLNetConfig, XLNetForQuestionAnsweringSimple

WIDTH, LENGTH, BATCH = 32, 12, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size lose more to a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base_config() -> XLNetConfig:
    return XLNetConfig(vocab_size=60, d_model=WIDTH, n_layer=2, n_head=4, d_inner=48)


@pytest.fixture
def base(base_config: XLNetConfig) -> XLNetForQuestionAnsweringSimple:
    torch.manual_seed(0)
    return XLNetForQuestionAnsweringSimple(base_config).eval()


@pytest.fixture
def segment() -> Callable[..., dict[str, Any]]:
    """Makes the inputs of one segment, padded on the left."""

    def make(seed: int = 0, *, labels: bool = True, padding: int = 0, batch: int = BATCH) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Any] = {
            "input_ids": torch.randint(6, 60, (batch, LENGTH), generator=generator),
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

    return make


@pytest.fixture
def awake() -> Callable[[Any], Any]:
    """Moves every projection that starts at zero off it, so that memory reaches every logit."""

    def wake(model: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.memory_named_parameters():
                if "memory_fusion.output" in name:
                    parameter.normal_(std=0.3, generator=generator)
        return model

    return wake


def _make_gmm(base: Any, **options: Any) -> Any:
    from memkern.models import GMMXLNetForQA

    return GMMXLNetForQA(base, **{"num_experts": 3, "memory_slots": 4, **options})


def _make_token(base: Any, **options: Any) -> Any:
    from memkern.models import MemXLNetForQA

    return MemXLNetForQA(base, **{"mem_token_count": 4, **options})


def _make_differentiable(base: Any, **options: Any) -> Any:
    from memkern.models import MemXLNetForQA

    chosen = {"use_differentiable_memory": True, "num_memory_heads": 2, "memory_slots": 6, **options}
    return MemXLNetForQA(base, **chosen)


KINDS: dict[str, Callable[..., Any]] = {
    "gmm": _make_gmm,
    "gmm, read-based": lambda base, **o: _make_gmm(base, routing_mode="read-based", pooling_method="attention", **o),
    "token": _make_token,
    "token, replaced": lambda base, **o: _make_token(base, memory_update="replace", **o),
    "token, none": lambda base, **o: _make_token(base, memory_update="none", **o),
    "differentiable": _make_differentiable,
    "differentiable, all": lambda base, **o: _make_differentiable(
        base,
        **{
            "mem_token_count": 3,
            "enable_usage_tracking": True,
            "enable_temporal_links": True,
            "memory_sharpness": 2.0,
            **o,
        },
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Every kind of memory: a function of the base model and further options."""
    return KINDS[request.param]


@pytest.fixture(params=["gmm", "token", "differentiable, all"])
def main_kind(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """One of each family."""
    return KINDS[request.param]
