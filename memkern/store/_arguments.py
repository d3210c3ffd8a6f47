"""What a store makes of its arguments: checks that name them, rows and ids as they are kept, filters as functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Filter = Mapping[str, Any] | Callable[[dict[str, Any]], bool]


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """ValueError that names the argument unless ``value`` is a known one."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


def as_int(value: Any) -> int | None:
    """An int of any library as Python's; None for what is none, True and False among it."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int) -> int:
    """``value``, an int >= ``least`` of any library, as Python's."""
    found = as_int(value)
    if found is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if found < least:
        raise ValueError(f"{name}: expected at least {least}, got {found}")
    return found


def number(name: str, value: Any) -> float:
    """``value`` as a float; NaN is refused."""
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if math.isnan(float(value)):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


def aligned(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    """``values`` as a list of ``count``, Nones by default."""
    if values is None:
        return [None] * count
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"{name}: expected {count}, got {len(listed)}")
    return listed


def text(name: str, value: Any) -> str:
    """``value``, a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected texts, got {type(value).__name__} {value!r}")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A copy of a dict; None is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dict or None, got {type(value).__name__} {value!r}")
    return dict(value or {})


def token_list(tokens: Sequence[int] | Tensor | None) -> list[int] | None:
    """Token ids as plain ints."""
    if tokens is None:
        return None
    try:
        return [operator.index(t) for t in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]
    except TypeError as error:
        raise TypeError(f"token_ids: expected ints, got {type(tokens).__name__} {tokens!r}") from error


def several_ids(ids: Any) -> list[Any]:
    """One id, or an iterable of them, as a list; each may be an int of any library."""
    try:
        return [operator.index(ids)]
    except TypeError:
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"ids: expected an int or several, got {type(ids).__name__} {ids!r}") from None
        return list(ids)


def new_id(value: Any) -> int:
    """An id that the caller gives a chunk, as an int."""
    id = as_int(value)
    if id is None:
        raise TypeError(f"ids: expected ints, got {type(value).__name__} {value!r}")
    if id < 0:
        raise ValueError(f"ids: expected ids >= 0, got {id}")
    return id


def numbers(name: str, value: Any) -> Tensor:
    """A tensor, an array, numbers in lists, or a list of tensors, as a tensor; only a tensor of ints stays one."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(row, Tensor) for row in value):
            given = torch.stack([row.detach() for row in value])
        elif hasattr(value, "__array__"):
            import numpy as np

            given = torch.tensor(np.ascontiguousarray(value), device="cpu")  # copied: it may be read-only
        else:
            given = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(value, list | tuple) else TypeError
        raise kind(f"{name}: expected a tensor, an array or lists of numbers, got {type(value).__name__}") from error
    return given if given.is_floating_point() or given.is_complex() else given.float()


def rows(name: str, value: Any, count: int | None, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, width) rows in this dtype on this device, n = ``count`` where that is given; NaN and infinity are refused."""
    given = numbers(name, value)
    if given.dim() == 1 and given.numel() == 0 and not count:
        given = given.reshape(0, width)
    if given.dim() != 2 or given.shape[1] != width or (count is not None and given.shape[0] != count):
        expected = f"({'n' if count is None else count}, {width})"
        raise ValueError(f"{name}: expected shape {expected}, got {list(given.shape)}")
    if not given.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {given.dtype}")
    given = given.to(device, dtype)
    if not bool(given.isfinite().all()):
        bad = tuple(int(i) for i in (~given.isfinite()).nonzero()[0])
        raise ValueError(f"{name}: expected finite values in {dtype}, got {given[bad].item()} at index {bad}")
    return given


def row(name: str, value: Any, width: int) -> Tensor:
    """(1, width) of one (width,) vector."""
    given = numbers(name, value)
    if given.dim() != 1 or given.shape[0] != width:
        raise ValueError(f"{name}: expected shape ({width}), got {list(given.shape)}")
    return given[None]


def matcher(wanted: Filter) -> Callable[[dict[str, Any]], bool]:
    """A filter as a function. By values: each key has the value, or one of a list, tuple or set of them."""
    if callable(wanted):
        return wanted
    if not isinstance(wanted, Mapping):
        raise TypeError(f"filter: expected a dict or a function, got {type(wanted).__name__} {wanted!r}")

    def matches(metadata: dict[str, Any]) -> bool:
        for key, value in wanted.items():
            if key not in metadata:
                return False
            found = metadata[key]
            # One by one: what stands in the metadata may be a list, which no set can be asked for.
            several = isinstance(value, list | tuple | set | frozenset) and any(found == one for one in value)
            if not several and found != value:
                return False
        return True

    return matches
