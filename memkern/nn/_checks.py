"""Checks that the modules of the mixture share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MIN_EXPERTS = 2
MAX_EXPERTS = 8


def num_experts(value: Any, max_experts: int) -> int:
    """``value`` is an integer in [2, max_experts]; a ValueError says so otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_EXPERTS <= value <= max_experts:
        hint = "" if max_experts > MAX_EXPERTS else "; max_experts= allows more"
        raise ValueError(f"num_experts must be in [{MIN_EXPERTS}, {max_experts}], got {value!r}{hint}")
    return value


def positive(name: str, value: Any) -> int:
    """``value`` is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def expert_index(index: int, count: int) -> None:
    """``index`` names one of ``count`` experts; an IndexError says so otherwise."""
    if not 0 <= index < count:
        raise IndexError(f"expert_idx must be in [0, {count - 1}], got {index}: there are {count} experts")


def expert_list(states: Any, count: int, context: str) -> None:
    """``states`` is a list of ``count`` tensors."""
    if not isinstance(states, list):
        raise ValueError(f"expert_states must be a list, got {type(states).__name__}")
    if len(states) != count:
        raise ValueError(f"expert_states must contain {count} experts, got {len(states)} ({context})")


def same_shape(states: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    """Every expert state is (B, S, D) as ``shape`` says."""
    for index, state in enumerate(states):
        if state.dim() != 3:
            raise ValueError(
                f"Expert {index} state must be 3D (batch_size, memory_slots, hidden_dim), got {state.dim()}D tensor"
            )
        if tuple(state.shape) != shape:
            raise ValueError(
                f"Expert {index} state has shape {tuple(state.shape)}, expected {shape}. "
                "All experts must maintain identical shape"
            )


def routing_probs(probs: Tensor, batch: int, count: int) -> None:
    """``probs`` is (batch, count)."""
    if probs.dim() != 2:
        raise ValueError(f"routing_probs must be 2D (batch_size, num_experts), got {probs.dim()}D tensor")
    if tuple(probs.shape) != (batch, count):
        raise ValueError(f"routing_probs must have shape ({batch}, {count}), got {tuple(probs.shape)}")


def rows(name: str, value: Tensor, width: int) -> None:
    """``value`` is (B, S, width)."""
    if value.dim() != 3:
        raise ValueError(f"{name} must be 3D (batch_size, memory_slots, hidden_dim), got {value.dim()}D tensor")
    if value.shape[2] != width:
        raise ValueError(f"{name} hidden_dim must be {width}, got {value.shape[2]}")
