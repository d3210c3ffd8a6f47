"""Memory states as values: moved, cut from their graph, cut by rows, saved and loaded.

A state is a tensor (B, m, D), a dict of tensors, or a :class:`memkern.ops.memory.MemoryState`; every tensor has the
batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
_FORMAT = "memkern-memory-state"


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The same state with ``function`` applied to each tensor; None stays None.

    Raises:
        TypeError: ``state`` is no memory state.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, Mapping):
        return {name: map_state(function, value) for name, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_state(function, value) for value in state))
    raise TypeError(f"memory_state: expected a tensor, a dict of tensors or a MemoryState, got {type(state).__name__}")


def detach_state(state: Any) -> Any:
    """The state without its graph: what truncated back-propagation carries on."""
    return map_state(lambda tensor: tensor.detach(), state)


def copy_state(state: Any) -> Any:
    """A detached copy with memory of its own."""
    return map_state(lambda tensor: tensor.detach().clone(), state)


def select_rows(state: Any, index: Tensor) -> Any:
    """The rows ``index`` (int64, or a bool mask) of a batched state."""
    return map_state(lambda tensor: tensor[index], state)


def save_state(state: Any, path: str | Path) -> None:
    """Write a state to a safetensors file, so that it can be carried on in another process.

    Raises:
        TypeError: ``state`` is no memory state.
    """
    if isinstance(state, Tensor):
        kind, tensors = "tensor", {"memory": state}
    elif isinstance(state, Mapping):
        kind, tensors = "dict", dict(state)
    elif isinstance(state, tuple) and hasattr(state, "_asdict"):
        kind, tensors = "differentiable", state._asdict()
    else:
        raise TypeError(f"state: expected a tensor, a dict of tensors or a MemoryState, got {type(state).__name__}")
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        str(path),
        metadata={"format": _FORMAT, "version": str(FORMAT_VERSION), "kind": kind},
    )


def load_state(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of a newer version, or no memory state; the message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory state at {path}")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no memory state of memkern")
    if int(metadata["version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has version {metadata['version']}, newer than {FORMAT_VERSION}, the newest known here"
        )
    if metadata["kind"] == "tensor":
        return tensors["memory"]
    if metadata["kind"] == "dict":
        return dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))
    from memkern.ops.memory import MemoryState

    return MemoryState(**tensors)


def _natural(name: str) -> tuple[str, int]:
    """Order expert_2 before expert_10."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (name, 0)
