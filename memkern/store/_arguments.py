"""What a store makes of its arguments: checks that name them, lists of the right length, filters as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Filter = Mapping[str, Any] | Callable[[dict[str, Any]], bool]


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """ValueError that names the argument unless ``value`` is a known one."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


def aligned(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    """``values`` as a list of ``count``, Nones by default."""
    if values is None:
        return [None] * count
    listed = list(values)
    if len(listed) != count:
        raise ValueError(f"{name}: expected {count}, got {len(listed)}")
    return listed


def token_list(tokens: Sequence[int] | Tensor | None) -> list[int] | None:
    """Token ids as plain ints."""
    if tokens is None:
        return None
    return [int(t) for t in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]


def matcher(wanted: Mapping[str, Any]) -> Callable[[dict[str, Any]], bool]:
    """A filter by values as a function: each key has the value, or one of a list, tuple or set of them."""

    def matches(metadata: dict[str, Any]) -> bool:
        for key, value in wanted.items():
            if key not in metadata:
                return False
            if isinstance(value, list | tuple | set | frozenset):
                if metadata[key] not in value:
                    return False
            elif metadata[key] != value:
                return False
        return True

    return matches
