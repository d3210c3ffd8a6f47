"""The configuration of XLNet with the gated memory mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import XLNetConfig

from memkern.models._xlnet.config import COMMON_FIELDS, MemoryConfigMixin, is_count, without_derived
from memkern.nn import _checks
from memkern.nn.gating import POOLINGS
from memkern.nn.mixture import check_strategies
from memkern.nn.reader import ROUTING_MODES


class GMMXLNetConfig(MemoryConfigMixin, XLNetConfig):
    """XLNet's fields, and those of its memory experts.

    Args:
        num_experts: k in [2, ``max_experts``]; ``num_memory_experts`` is accepted too.
        memory_slots: S, slots of each expert.
        routing_mode: "write-based" or "read-based"; ``gmm_routing_mode`` is accepted too.
        routing_temperature: > 0.
        pooling_method: of the write router: "mean", "max" or "attention".
        init_strategies: of the learned initial memory; see :class:`memkern.nn.GatedMemoryMixture`.
        use_gmm_memory: False is the base model, bit for bit.
        mem_token_count: read and write tokens of a segment, one per slot: None or ``memory_slots``.
        max_experts: the largest k accepted.
        load_balance_weight, entropy_regularization_weight: >= 0, weights of the auxiliary losses.
        read_injection: where a read enters, "input", "head" or "both".
        strict_memory_tokens: refuse inputs in which a memory token that was named is absent.
        memory_backend: backend of every memory operator; see :mod:`memkern.backends`.
        bptt_segments: in a forward over whole documents, cut the state's graph every so many segments.
        mem_read_ids, mem_write_ids: ids of the memory tokens where the inputs carry them.
        cls_token_id: unused by this model, kept for a conversion.
        **kwargs: fields of ``XLNetConfig``.

    Raises:
        ValueError: a value out of range or an unknown mode, named.
    """

    model_type = "gmm_xlnet"
    memory_fields = (
        "num_experts",
        "memory_slots",
        "routing_mode",
        "routing_temperature",
        "pooling_method",
        "init_strategies",
        "use_gmm_memory",
        "mem_token_count",
        "max_experts",
        "load_balance_weight",
        "entropy_regularization_weight",
        *COMMON_FIELDS,
    )
    type_fields = ("use_gmm_memory", "num_experts")
    aliases = {"num_memory_experts": "num_experts", "gmm_routing_mode": "routing_mode"}  # noqa: RUF012 - never changed

    def __init__(
        self,
        num_experts: int = 4,
        memory_slots: int = 16,
        routing_mode: str = "write-based",
        routing_temperature: float = 1.0,
        pooling_method: str = "mean",
        init_strategies: str | Sequence[str] = "orthogonal",
        use_gmm_memory: bool = True,
        mem_token_count: int | None = None,
        max_experts: int = _checks.MAX_EXPERTS,
        load_balance_weight: float = 0.01,
        entropy_regularization_weight: float = 0.0,
        read_injection: str = "both",
        strict_memory_tokens: bool = False,
        memory_backend: str | None = None,
        bptt_segments: int | None = None,
        mem_read_ids: Sequence[int] | None = None,
        mem_write_ids: Sequence[int] | None = None,
        cls_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        num_experts = kwargs.pop("num_memory_experts", num_experts)
        routing_mode = kwargs.pop("gmm_routing_mode", routing_mode)
        super().__init__(**without_derived(kwargs))
        _checks.num_experts(num_experts, max_experts)
        _checks.positive("memory_slots", memory_slots)
        if routing_mode not in ROUTING_MODES:
            raise ValueError(f"routing_mode must be 'write-based' or 'read-based', got {routing_mode!r}")
        if isinstance(routing_temperature, bool) or not routing_temperature > 0:
            raise ValueError(f"routing_temperature: Temperature must be > 0, got {routing_temperature!r}")
        if pooling_method not in POOLINGS:
            raise ValueError(f"pooling_method must be one of 'mean', 'max', 'attention', got {pooling_method!r}")
        check_strategies(init_strategies, num_experts)
        if mem_token_count is not None and use_gmm_memory and mem_token_count != memory_slots:
            raise ValueError(
                f"mem_token_count must be memory_slots ({memory_slots}), one write token per slot, "
                f"got {mem_token_count!r}"
            )
        if mem_token_count is not None and not is_count(mem_token_count, 0):
            raise ValueError(f"mem_token_count must be an integer >= 0, got {mem_token_count!r}")
        for name, weight in (
            ("load_balance_weight", load_balance_weight),
            ("entropy_regularization_weight", entropy_regularization_weight),
        ):
            if not weight >= 0:
                raise ValueError(f"{name} must be >= 0, got {weight!r}")
        self.num_experts = num_experts
        self.memory_slots = memory_slots
        self.routing_mode = routing_mode
        self.routing_temperature = routing_temperature
        self.pooling_method = pooling_method
        self.init_strategies = init_strategies if isinstance(init_strategies, str) else list(init_strategies)
        self.use_gmm_memory = use_gmm_memory
        self.mem_token_count = memory_slots if mem_token_count is None else mem_token_count
        self.max_experts = max_experts
        self.load_balance_weight = load_balance_weight
        self.entropy_regularization_weight = entropy_regularization_weight
        self._set_common(
            read_injection,
            strict_memory_tokens,
            memory_backend,
            bptt_segments,
            mem_read_ids,
            mem_write_ids,
            cls_token_id,
        )

    @property
    def memory_type(self) -> str:
        """ "gmm", or "standard" (off)."""
        return "gmm" if self.use_gmm_memory else "standard"
