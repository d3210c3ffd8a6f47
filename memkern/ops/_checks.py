"""Argument checks that every operator shares: each message names the argument, what was expected and what came.

Shapes, dtypes and devices are checked always, without touching a value. Values inside tensors are checked only under
``MEMKERN_CHECK=1``, which synchronises; :func:`values_enabled` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from memkern.backends import ENVIRONMENT

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_PLAIN = (Tensor, torch.nn.Parameter)


def values_enabled() -> bool:
    """Whether ``MEMKERN_CHECK=1`` asks for value checks, now; never while compiling, where there are no values."""
    return ENVIRONMENT.get(b"MEMKERN_CHECK", b"") not in (b"", b"0") and not torch.compiler.is_compiling()


def fail(name: str, expected: str, given: Any) -> NoReturn:
    """Raise the ValueError of a bad argument."""
    raise ValueError(f"{name}: expected {expected}, got {describe(given)}")


def fail_type(name: str, expected: str, given: Any) -> NoReturn:
    """Raise the TypeError of an argument of the wrong type."""
    raise TypeError(f"{name}: expected {expected}, got {describe(given)}")


def describe(value: Any) -> str:
    """A tensor as dtype, shape and device; anything else by its type and value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: Any) -> Tensor:
    """``value`` is a plain tensor; a DTensor is refused by name: its local part alone would give a wrong result."""
    if type(value) in _PLAIN:
        return value  # type: ignore[no-any-return]
    if not isinstance(value, Tensor):
        fail_type(name, "a tensor", value)
    if any(base.__name__ == "DTensor" for base in type(value).__mro__):
        raise TypeError(
            f"{name}: got a DTensor; memkern operators take local tensors. Pass {name}.full_tensor() for the whole, or "
            f"{name}.to_local() when its placement keeps the operation local (batch-sharded, or replicated)"
        )
    return value


def floating(
    name: str, value: Any, shape: Sequence[int | str | None], like: Tensor | None = None, like_name: str = ""
) -> Tensor:
    """``value`` is a floating tensor of this shape (None or a letter: any size there), on the device of ``like``."""
    given = tensor(name, value)
    if given.dtype not in FLOATS:
        fail(name, "a floating dtype (float32, bfloat16, float16 or float64)", given)
    _shape(name, given, shape)
    if like is not None:
        same_device(name, given, like, like_name)
        if (given.dtype == torch.float64) != (like.dtype == torch.float64):
            fail(name, f"float64 together with float64 only ({like_name} is {describe(like)})", given)
    return given


def mask(name: str, value: Any, shape: Sequence[int | str | None], like: Tensor, like_name: str) -> Tensor:
    """``value`` is a bool tensor of this shape on the device of ``like``; any other dtype is a TypeError."""
    given = tensor(name, value)
    if given.dtype != torch.bool:
        fail_type(name, "a bool mask (True takes part)", given)
    _shape(name, given, shape)
    same_device(name, given, like, like_name)
    return given


def integer(name: str, value: Any, shape: Sequence[int | str | None], like: Tensor, like_name: str) -> Tensor:
    """``value`` is an int64 tensor of this shape on the device of ``like``."""
    given = tensor(name, value)
    if given.dtype != torch.int64:
        fail(name, "an int64 tensor", given)
    _shape(name, given, shape)
    same_device(name, given, like, like_name)
    return given


def same_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """``value`` lies on the device of ``like``."""
    if value.device != like.device:
        fail(name, f"the device of {like_name} ({like.device})", value)


def _shape(name: str, value: Tensor, shape: Sequence[int | str | None]) -> None:
    if value.dim() != len(shape):
        fail(name, f"shape {_letters(shape)} ({len(shape)} dimensions)", value)
    for size, want in zip(value.shape, shape, strict=True):
        if isinstance(want, int | torch.SymInt) and size != want:
            fail(name, f"shape {_letters(shape)}", value)


def _letters(shape: Sequence[int | str | None]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def temperature(value: float | Tensor, like: Tensor, like_name: str) -> float | Tensor:
    """A temperature, to be used: a number > 0, or a 0-d floating tensor on the device of ``like``."""
    if isinstance(value, Tensor):
        # A CPU scalar would have to be copied to the GPU at each call, which blocks graph capture. Its dtype follows
        # that of the tensor, as torch's own 0-d tensors do.
        same_device("temperature", floating("temperature", value, ()), like, like_name)
        return value if (value.dtype == torch.float64) == (like.dtype == torch.float64) else value.to(like.dtype)
    number: Any = value
    if isinstance(number, bool) or not isinstance(number, int | float | torch.SymFloat | torch.SymInt):
        fail_type("temperature", "a float or a 0-d tensor", value)
    if not value > 0 or value == float("inf"):
        fail("temperature", "a finite number > 0", value)
    return value


def flag(name: str, value: Any) -> None:
    """``value`` is True or False."""
    if value is not True and value is not False:
        fail_type(name, "a bool", value)


def choice(name: str, value: Any, known: Sequence[str]) -> None:
    """``value`` is one of the known strings."""
    if value not in known:
        fail(name, f"one of {', '.join(map(repr, known))}", value)


def first_bad(name: str, bad: Tensor, expected: str, value: Tensor) -> None:
    """Under MEMKERN_CHECK=1: raise when any element of ``bad`` is set, naming the first index and what stands there."""
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {value[index].item()!r} at index {index}")


def no_nan(name: str, value: Tensor | None, included: Tensor | None = None) -> None:
    """Under MEMKERN_CHECK=1: no NaN where ``included`` (broadcastable, everywhere by default) is True."""
    if value is not None:
        bad = value.isnan()
        first_bad(name, bad if included is None else bad & included, "no NaN", value)


def in_range(name: str, value: Tensor | None, low: float, high: float) -> None:
    """Under MEMKERN_CHECK=1: every value in [low, high], NaN refused."""
    if value is not None:
        first_bad(name, ~((value >= low) & (value <= high)), f"values in [{low:g}, {high:g}]", value)


def positive(name: str, value: Tensor | None) -> None:
    """Under MEMKERN_CHECK=1: every value > 0, NaN refused."""
    if value is not None:
        first_bad(name, ~(value > 0), "values > 0", value)


def probabilities(name: str, value: Tensor | None, tolerance: float = 1e-2) -> None:
    """Under MEMKERN_CHECK=1: rows of the last axis are >= 0 and sum to 1."""
    if value is not None and value.numel():
        in_range(name, value, 0.0, 1.0 + tolerance)
        sums = value.double().sum(-1)
        first_bad(name, (sums - 1).abs() > tolerance, "rows that sum to 1", sums)
