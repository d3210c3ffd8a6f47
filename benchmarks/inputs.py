"""Arguments of an operator as one safetensors file, so that a failure can be run again elsewhere.

Tensors are stored by dotted name; everything else, and where each tensor goes, as JSON in the file's metadata.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .registry import Case


def save(path: Path, case: Case, arguments: Mapping[str, Any]) -> None:
    """Write the arguments of a case; strides are lost, values and ``requires_grad`` are kept."""
    tensors: dict[str, Tensor] = {}
    tree = {name: _pack(value, name, tensors) for name, value in arguments.items()}
    about = {
        "op": case.spec.name,
        "variant": case.variant,
        "dtype": case.dtype,
        "shape": case.shape,
        "arguments": tree,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"memkern": json.dumps(about)})


def load(path: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file is about (op, variant, dtype, shape), and the arguments on ``device``.

    Raises:
        ValueError: not a file that :func:`save` wrote.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            about = json.loads((file.metadata() or {})["memkern"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a file of saved inputs ({error})") from error
    column = _column(about["op"])
    return about, {name: _unpack(value, tensors, column) for name, value in about.pop("arguments").items()}


def _column(op: str) -> str:
    from .registry import spec

    return spec(op).column


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # Clones: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "requires_grad": value.requires_grad}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = zip(value._fields, value, strict=True)
        fields = {key: _pack(item, f"{name}.{key}", tensors) for key, item in named}
        return {"named": type(value).__name__, "fields": fields}
    if isinstance(value, list | tuple):
        return {"sequence": [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name}: cannot save a {type(value).__name__}")


def _unpack(packed: Any, tensors: Mapping[str, Tensor], column: str) -> Any:
    if "tensor" in packed:
        return tensors[packed["tensor"]].requires_grad_(packed["requires_grad"])
    if "named" in packed:
        fields = {key: _unpack(item, tensors, column) for key, item in packed["fields"].items()}
        return named_tuple(column, packed["named"])(**fields)
    if "sequence" in packed:
        return [_unpack(item, tensors, column) for item in packed["sequence"]]
    return packed["value"]


def named_tuple(column: str, name: str) -> Any:
    """A named tuple type of a column's reference, such as ``MemoryState``.

    Raises:
        ValueError: the column has none of this name.
    """
    found = getattr(importlib.import_module(f"memkern.reference.{column}"), name, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise ValueError(f"memkern.reference.{column} has no named tuple {name!r}")
    return found
