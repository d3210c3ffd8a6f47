"""The configuration of XLNet with token memory or differentiable memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import XLNetConfig

from memkern.models._xlnet.config import COMMON_FIELDS, MemoryConfigMixin, is_count, without_derived

MEMORY_INITS = ("learned", "zeros")
MEMORY_UPDATES = ("gated", "none", "replace")


class MemXLNetConfig(MemoryConfigMixin, XLNetConfig):
    """XLNet's fields, and those of its memory.

    Args:
        mem_token_count: m, read and write tokens of a segment; 0 switches token memory off.
        memory_init: "learned" initial memory, or "zeros".
        memory_update: "gated", "none" (the initial memory stays) or "replace".
        memory_dim: None or XLNet's width.
        use_differentiable_memory: a memory of slots with learned addressing in place of token memory.
        num_memory_heads: heads that read and heads that write.
        memory_sharpness: > 0; higher is never less focused.
        enable_usage_tracking, enable_temporal_links: see :class:`memkern.nn.MemoryController`.
        memory_slots: N; None means max(m, 16).
        read_injection: where a read enters, "input", "head" or "both".
        strict_memory_tokens: refuse inputs in which a memory token that was named is absent.
        memory_backend: backend of every memory operator; see :mod:`memkern.backends`.
        bptt_segments: in a forward over whole documents, cut the state's graph every so many segments.
        mem_read_ids, mem_write_ids: ids of the memory tokens where the inputs carry them.
        cls_token_id: the CLS token, whose state the differentiable memory reads; None means the last token.
        **kwargs: fields of ``XLNetConfig``.

    Raises:
        ValueError: a value out of range or an unknown mode, named.
    """

    model_type = "memxlnet"
    memory_fields = (
        "mem_token_count",
        "memory_init",
        "memory_update",
        "memory_dim",
        "use_differentiable_memory",
        "num_memory_heads",
        "memory_sharpness",
        "enable_usage_tracking",
        "enable_temporal_links",
        "memory_slots",
        *COMMON_FIELDS,
    )
    type_fields = ("mem_token_count", "use_differentiable_memory")

    def __init__(
        self,
        mem_token_count: int = 0,
        memory_init: str = "learned",
        memory_update: str = "gated",
        memory_dim: int | None = None,
        use_differentiable_memory: bool = False,
        num_memory_heads: int = 1,
        memory_sharpness: float = 1.0,
        enable_usage_tracking: bool = False,
        enable_temporal_links: bool = False,
        memory_slots: int | None = None,
        read_injection: str = "both",
        strict_memory_tokens: bool = False,
        memory_backend: str | None = None,
        bptt_segments: int | None = None,
        mem_read_ids: Sequence[int] | None = None,
        mem_write_ids: Sequence[int] | None = None,
        cls_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**without_derived(kwargs))
        if not is_count(mem_token_count, 0):
            raise ValueError(f"mem_token_count must be an integer >= 0, got {mem_token_count!r}")
        if memory_init not in MEMORY_INITS:
            raise ValueError(f"memory_init must be 'learned' or 'zeros', got {memory_init!r}")
        if memory_update not in MEMORY_UPDATES:
            raise ValueError(f"memory_update must be one of 'gated', 'none', 'replace', got {memory_update!r}")
        if memory_dim is not None and memory_dim != self.d_model:
            raise ValueError(f"memory_dim must be None or d_model ({self.d_model}), got {memory_dim!r}")
        if not is_count(num_memory_heads, 1):
            raise ValueError(f"num_memory_heads must be an integer >= 1, got {num_memory_heads!r}")
        if isinstance(memory_sharpness, bool) or not memory_sharpness > 0:
            raise ValueError(f"memory_sharpness must be > 0, got {memory_sharpness!r}")
        if memory_slots is not None and not is_count(memory_slots, 1):
            raise ValueError(f"memory_slots must be an integer >= 1 or None, got {memory_slots!r}")
        self.mem_token_count = mem_token_count
        self.memory_init = memory_init
        self.memory_update = memory_update
        self.memory_dim = memory_dim
        self.use_differentiable_memory = use_differentiable_memory
        self.num_memory_heads = num_memory_heads
        self.memory_sharpness = memory_sharpness
        self.enable_usage_tracking = enable_usage_tracking
        self.enable_temporal_links = enable_temporal_links
        self.memory_slots = memory_slots
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
        """ "standard" (off), "token" or "differentiable"."""
        if self.use_differentiable_memory:
            return "differentiable"
        return "token" if self.mem_token_count else "standard"

    @property
    def resolved_memory_slots(self) -> int:
        """N of the differentiable memory."""
        return max(self.mem_token_count, 16) if self.memory_slots is None else self.memory_slots
