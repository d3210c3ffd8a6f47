"""Checks of a memory's state and interface: each message names the field, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkern.ops import _checks
from memkern.ops.memory.addressing import check_exponent
from memkern.reference.memory import MemoryInterface, MemoryState

_NEAR_ONE = 1.0 + 1e-2


def check_state(state: Any) -> tuple[int, int, int, int, int]:
    """``state`` is a MemoryState whose fields fit together; returns (B, N, W, R, H)."""
    if not isinstance(state, MemoryState):
        _checks.fail_type("state", "a MemoryState", state)
    memory = _checks.floating("state.memory", state.memory, ("B", "N", "W"))
    batch, slots, width = memory.shape

    def field(name: str, value: Any, *shape: int | str) -> Tensor:
        return _checks.floating(f"state.{name}", value, shape, memory, "state.memory")

    field("usage", state.usage, batch, slots)
    write_heads = field("write_weights", state.write_weights, batch, "H", slots).shape[1]
    read_heads = field("read_weights", state.read_weights, batch, "R", slots).shape[1]
    field("links", state.links, batch, write_heads, slots, slots)
    field("precedence", state.precedence, batch, write_heads, slots)
    for name, size, value in (
        ("memory", min(slots, width), state.memory),
        ("write_weights", write_heads, state.write_weights),
        ("read_weights", read_heads, state.read_weights),
    ):
        if size == 0:
            _checks.fail(f"state.{name}", "at least one slot, column, read head and write head", value)
    return batch, slots, width, read_heads, write_heads


def plainly_fine(
    state: Any, interface: Any, *, scan: bool
) -> tuple[tuple[int, ...], tuple[int, int, int, int, int]] | None:
    """The frequent case in few comparisons: float32 tensors that fit. Returns (B,) or (B, T), and (B, N, W, R, H).

    None means: look closer, with the messages of the other checks.
    """
    if type(state) is not MemoryState or type(interface) is not MemoryInterface:
        return None
    memory, keys = state.memory, interface.read_keys
    for value in (memory, state.read_weights, state.write_weights, keys):
        if type(value) not in _checks._PLAIN or value.dim() < 3:
            return None
    batch, slots, width = memory.shape[:3]
    reads, writes = state.read_weights.shape[1], state.write_weights.shape[1]
    lead = (batch, keys.shape[1]) if scan else (batch,)
    if not (slots and width and reads and writes):
        return None
    device, vectors = memory.device, (*lead, writes, width)
    expected = (
        (batch, slots, width),
        (batch, slots),
        (batch, writes, slots, slots),
        (batch, writes, slots),
        (batch, reads, slots),
        (batch, writes, slots),
        (*lead, reads, width),
        (*lead, reads),
        (*lead, reads, 1 + 2 * writes),
        vectors,
        (*lead, writes),
        vectors,
        vectors,
        (*lead, reads),
        (*lead, writes),
        (*lead, writes),
    )
    for value, shape in zip((*state, *interface), expected, strict=True):
        if (
            type(value) not in _checks._PLAIN
            or value.dtype is not torch.float32
            or value.shape != shape
            or value.device != device
        ):
            return None
    return lead, (batch, slots, width, reads, writes)


def check_interface(
    interface: Any, sizes: tuple[int, int, int, int, int], like: Tensor, *, scan: bool
) -> tuple[int, ...]:
    """``interface`` is a MemoryInterface that fits a state of these sizes; returns its (B,) or (B, T)."""
    if not isinstance(interface, MemoryInterface):
        _checks.fail_type("interface", "a MemoryInterface", interface)
    batch, _, width, read_heads, write_heads = sizes
    lead: tuple[int | str, ...] = (batch, "T") if scan else (batch,)
    trailing = {
        "read_keys": (read_heads, width),
        "read_strengths": (read_heads,),
        "read_modes": (read_heads, 1 + 2 * write_heads),
        "write_keys": (write_heads, width),
        "write_strengths": (write_heads,),
        "write_vectors": (write_heads, width),
        "erase_vectors": (write_heads, width),
        "free_gates": (read_heads,),
        "allocation_gates": (write_heads,),
        "write_gates": (write_heads,),
    }
    for name, value in zip(interface._fields, interface, strict=True):
        given = _checks.floating(f"interface.{name}", value, (*lead, *trailing[name]), like, "state.memory")
        if scan and lead[1] == "T":
            lead = (batch, given.shape[1])
    return tuple(interface.read_keys.shape[:2] if scan else interface.read_keys.shape[:1])


def check_step_mask(step_mask: Any, lead: tuple[int, ...], like: Tensor) -> Tensor | None:
    """``step_mask`` is None or bool of the interface's leading sizes; (B,) for a scan holds for each of its steps."""
    if step_mask is None:
        return None
    if len(lead) == 2 and isinstance(step_mask, Tensor) and step_mask.dim() == 1:
        return _checks.mask("step_mask", step_mask, lead[:1], like, "state.memory")[:, None].expand(lead)
    return _checks.mask("step_mask", step_mask, lead, like, "state.memory")


def check_sharpness(sharpness: Any, lead: tuple[int, ...], read_heads: int, like: Tensor) -> float | Tensor | None:
    """None for the identity (None, or the number 1), the number, or a tensor that broadcasts to (*lead, R).

    A (B, R) tensor belongs to every step of a scan.
    """
    if sharpness is None:
        return None
    if isinstance(sharpness, Tensor):
        rows = (*lead, read_heads)
        if len(lead) == 2 and sharpness.dim() == 2:
            check_exponent("sharpness", sharpness, (lead[0], read_heads), like, "state.memory")
            return sharpness[:, None].expand(rows)
        check_exponent("sharpness", sharpness, rows, like, "state.memory")
        return sharpness.expand(rows)
    value = check_exponent("sharpness", sharpness, (), like, "state.memory")
    return None if value == 1 else value


def check_values(state: MemoryState, interface: MemoryInterface, sharpness: Any, step_mask: Tensor | None) -> None:
    """Under MEMKERN_CHECK=1: weights, gates and usage in range, modes that sum to 1, no NaN; masked rows apart."""

    def rows(value: Tensor, state_field: bool = False) -> Tensor | None:
        if step_mask is None:
            return None
        mask = step_mask.any(1) if state_field and step_mask.dim() == 2 else step_mask
        return mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim())).expand(value.shape)

    def in_range(name: str, value: Tensor, high: float, state_field: bool = False) -> None:
        bad, counted = ~((value >= 0) & (value <= high)), rows(value, state_field)
        _checks.first_bad(name, bad if counted is None else bad & counted, f"values in [0, {high:g}]", value)

    for name in ("usage", "links", "precedence", "read_weights", "write_weights"):
        in_range(f"state.{name}", getattr(state, name), _NEAR_ONE, True)
    _checks.no_nan("state.memory", state.memory, rows(state.memory, True))
    for name in ("read_keys", "write_keys", "write_vectors"):
        value = getattr(interface, name)
        _checks.no_nan(f"interface.{name}", value, rows(value))
    for name in ("read_strengths", "write_strengths"):
        in_range(f"interface.{name}", getattr(interface, name), torch.inf)
    for name in ("erase_vectors", "free_gates", "allocation_gates", "write_gates"):
        in_range(f"interface.{name}", getattr(interface, name), 1.0)
    modes = interface.read_modes
    in_range("interface.read_modes", modes, _NEAR_ONE)
    sums = modes.double().sum(-1)
    counted = rows(sums)
    bad = (sums - 1).abs() > 1e-2
    _checks.first_bad("interface.read_modes", bad if counted is None else bad & counted, "rows that sum to 1", sums)
    if isinstance(sharpness, Tensor):
        _checks.positive("sharpness", sharpness)
