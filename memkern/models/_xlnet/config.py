"""Fields and checks that the configurations of both XLNet models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import XLNetConfig

from memkern import backends

MEMORY_FORMAT_VERSION = 1
READ_INJECTIONS = ("input", "head", "both")


class MemoryConfigMixin:
    """A config that knows its memory type, and which of its fields are about memory."""

    memory_fields: ClassVar[tuple[str, ...]]
    """Every field about memory, by the name of its keyword."""
    type_fields: ClassVar[tuple[str, ...]]
    """Keywords that choose the memory type; giving one to ``from_pretrained`` asks for a conversion."""
    aliases: ClassVar[dict[str, str]] = {}
    """Other names under which a field is accepted."""

    keys_to_ignore_at_inference: Any = [  # noqa: RUF012 - transformers adds to a list
        "mems",
        "new_memory_state",
        "memory_info",
        "routing_info",
        "load_balance_loss",
        "entropy_loss",
    ]

    @property
    def memory_type(self) -> str:
        """ "standard", "token", "differentiable" or "gmm"."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields, with ``memory_type`` and ``memory_format_version``, as config.json holds them."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        fields["memory_type"] = self.memory_type
        fields["memory_format_version"] = MEMORY_FORMAT_VERSION
        return fields

    def _set_common(
        self,
        read_injection: str,
        strict_memory_tokens: bool,
        memory_backend: str | None,
        bptt_segments: int | None,
        mem_read_ids: Sequence[int] | None,
        mem_write_ids: Sequence[int] | None,
        cls_token_id: int | None,
    ) -> None:
        if read_injection not in READ_INJECTIONS:
            raise ValueError(f"read_injection must be one of 'input', 'head', 'both', got {read_injection!r}")
        if memory_backend is not None and memory_backend not in backends.NAMES:
            raise ValueError(f"memory_backend must be one of {', '.join(backends.NAMES)}, got {memory_backend!r}")
        if bptt_segments is not None and not is_count(bptt_segments, 1):
            raise ValueError(f"bptt_segments must be an integer >= 1 or None, got {bptt_segments!r}")
        self.read_injection = read_injection
        self.strict_memory_tokens = strict_memory_tokens
        self.memory_backend = memory_backend
        self.bptt_segments = bptt_segments
        self.mem_read_ids = None if mem_read_ids is None else list(mem_read_ids)
        self.mem_write_ids = None if mem_write_ids is None else list(mem_write_ids)
        self.cls_token_id = cls_token_id


COMMON_FIELDS = (
    "read_injection",
    "strict_memory_tokens",
    "memory_backend",
    "bptt_segments",
    "mem_read_ids",
    "mem_write_ids",
    "cls_token_id",
)


def is_count(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def without_derived(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` without what a config derives itself; a format newer than this one is refused.

    Raises:
        ValueError: ``memory_format_version`` is newer than the newest known here.
    """
    version = fields.pop("memory_format_version", MEMORY_FORMAT_VERSION)
    fields.pop("memory_type", None)
    if version > MEMORY_FORMAT_VERSION:
        raise ValueError(
            f"memory_format_version {version} is newer than {MEMORY_FORMAT_VERSION}, the newest known here: "
            "a newer memkern reads it"
        )
    return fields


def backbone_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a config's dict that XLNet itself knows."""
    known = set(XLNetConfig().to_dict()) | set(XLNetConfig.attribute_map)
    dropped = {"model_type", "architectures", "transformers_version"}
    return {name: value for name, value in fields.items() if name in known - dropped}
