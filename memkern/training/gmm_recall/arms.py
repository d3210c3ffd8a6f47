"""The arms of the protocol: one tiny backbone, and what each arm has for memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["carried", "mems", "reset", "swapped"]


@dataclass(frozen=True)
class Sizes:
    """The backbone, the same in every arm."""

    d_model: int = 64
    n_layer: int = 2
    n_head: int = 4
    d_inner: int = 128
    initializer_range: float = 0.1
    memory_tokens: int = 4


@dataclass(frozen=True)
class Arm:
    """What memory an arm has; ``trained_as`` names the arm whose trained model it evaluates in another way."""

    title: str
    model: Literal["memxlnet", "gmm"] = "memxlnet"
    options: Mapping[str, Any] = field(default_factory=dict)
    state: State = "carried"
    trained_as: str | None = None


# At temperature 1 a fresh router spreads every write over all experts, a quarter each, and memory is slow to be learnt.
_GMM: dict[str, Any] = {"routing_temperature": 0.2}

ARMS: dict[str, Arm] = {
    "none": Arm("no memory"),
    "mems": Arm("native mems, one segment", state="mems"),
    "token": Arm("token memory (overwritten)", options={"memory_update": "replace", "mem_token_count": True}),
    "token-gated": Arm("token memory, gated", options={"memory_update": "gated", "mem_token_count": True}),
    "differentiable": Arm(
        "differentiable memory",
        options={
            "use_differentiable_memory": True,
            "num_memory_heads": 2,
            "memory_slots": 16,
            "enable_usage_tracking": True,
            "enable_temporal_links": True,
        },
    ),
    "gmm": Arm("GMM, 4 experts", model="gmm", options=_GMM),
    "gmm-reset": Arm("GMM, state reset between segments", model="gmm", state="reset", trained_as="gmm"),
    "gmm-swapped": Arm("GMM, states swapped between documents", model="gmm", state="swapped", trained_as="gmm"),
    "gmm-no-balance": Arm("GMM without load-balance loss", model="gmm", options=_GMM | {"load_balance_weight": 0.0}),
}


def build(name: str, vocabulary: int, segment_length: int, sizes: Sizes = Sizes()) -> Any:
    """A fresh model of an arm; its weights are drawn from torch's global generator.

    Args:
        name: one of :data:`ARMS`.
        vocabulary: token ids.
        segment_length: tokens of a segment, which is what native mems keep.
        sizes: of the backbone and the memory.
    """
    from transformers import XLNetConfig

    from memkern.models.gmm_xlnet import GMMXLNetForQA
    from memkern.models.memxlnet import MemXLNetForQA

    arm = ARMS[name]
    config = XLNetConfig(
        vocab_size=vocabulary,
        d_model=sizes.d_model,
        n_layer=sizes.n_layer,
        n_head=sizes.n_head,
        d_inner=sizes.d_inner,
        initializer_range=sizes.initializer_range,
        dropout=0.0,
        mem_len=segment_length if arm.state == "mems" else None,
    )
    options = dict(arm.options)
    if arm.model == "gmm":
        return GMMXLNetForQA(config, num_experts=4, memory_slots=sizes.memory_tokens, **options)
    if options.get("mem_token_count"):
        options["mem_token_count"] = sizes.memory_tokens
    return MemXLNetForQA(config, **options)
