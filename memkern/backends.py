"""Which backends exist here, why one cannot take these inputs, and how one is chosen. Nothing else decides.

Four names: ``reference`` (pure PyTorch, anywhere), ``cpp`` (C++, CPU tensors), ``triton`` (CUDA tensors, and CPU
tensors under Triton's interpreter) and ``cuda`` (CUDA C++). An operator states with :func:`declare` which of them
implement it and for which dtypes. :func:`select` then takes the explicit choice (``backend=``, else
:class:`use_backend` or ``MEMKERN_BACKEND``) or refuses it with every backend's reason; it never falls back silently.
Without a choice, CPU tensors go to ``cpp`` and CUDA tensors to what ``configs/dispatch.json`` says for the op, dtype
and size, then to ``reference``.

The process-wide choice is a plain module global, and the environment is read at each call: ``torch.compile`` guards
both, so a change recompiles instead of being lost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkern import native

NAMES = ("reference", "cpp", "triton", "cuda")
LOW: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
ALL: tuple[torch.dtype, ...] = (*LOW, torch.float64)

Limit = Callable[..., str | None]


class BackendUnavailable(RuntimeError):
    """A known backend that was asked for cannot take this call; the message holds every backend's reason."""


_forced: str | None = None
# The dictionary behind os.environ, whose own lookup of what is not set raises and catches: a microsecond a call.
ENVIRONMENT: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_VARIABLE: Any = os.environ.encodekey("MEMKERN_BACKEND")  # type: ignore[attr-defined]
_AS_SET: dict[Any, str | None] = {None: None, os.environ.encodevalue(""): None} | {  # type: ignore[attr-defined]
    os.environ.encodevalue(name): name  # type: ignore[attr-defined]
    for name in NAMES
}
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {}
_LIMITS: dict[tuple[str, str], Limit] = {}
_MISSING: dict[tuple[str, str], str] = {}
_PREFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "configs" / "dispatch.json").read_text())["ops"]
_warned: set[tuple[str, str]] = set()
_ON_CPU: dict[tuple[Any, ...], str] = {}


def _check_name(name: str, origin: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{origin}: unknown backend {name!r}; the known ones are {', '.join(NAMES)}")


class use_backend:
    """Choose the backend of every operator in this process: ``use_backend("triton")``, or ``with use_backend("cpp"):``.

    Args:
        name: one of ``memkern.backends.NAMES``; None returns to ``MEMKERN_BACKEND``, else to the automatic choice.

    Raises:
        ValueError: ``name`` is not a backend.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check_name(name, "use_backend")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._previous


def declare(
    op: str,
    *,
    cpp: Iterable[torch.dtype] | None = None,
    triton: Iterable[torch.dtype] | None = None,
    cuda: Iterable[torch.dtype] | None = None,
    limits: dict[str, Limit] | None = None,
) -> None:
    """State the dtypes for which each compiled backend implements ``op``; ``limits`` maps a backend to a function of
    the call's tensors that returns why it cannot take them, or None."""
    _DTYPES[op, "reference"] = ALL
    for name, dtypes in (("cpp", cpp), ("triton", triton), ("cuda", cuda)):
        if dtypes is not None:
            _DTYPES[op, name] = tuple(dtypes)
    for name, limit in (limits or {}).items():
        _LIMITS[op, name] = limit
    for name, library, key in (("cpp", native.LIBRARIES["cpu"], "CPU"), ("cuda", native.LIBRARIES["cuda"], "CUDA")):
        raw = f"memkern::{op}_fwd_{name}"
        if not library.loaded or not torch._C._dispatch_has_kernel(raw):
            continue
        # Known here, once: torch.compile could not trace the question.
        if not torch._C._dispatch_has_kernel_for_dispatch_key(raw, key):
            older = f"{library.path.name} has no {op}: it is older than the Python files"
            _MISSING[op, name] = f"{older}. {native.REPAIR}"


def _absent(name: str, device: str | None) -> str | None:
    """Why backend ``name`` cannot run on a device of this type in this process, or None; any device for None."""
    if name == "reference":
        return None
    if name == "cpp":
        if native.LIBRARIES["cpu"].reason is not None:
            return native.LIBRARIES["cpu"].reason
        return None if device in ("cpu", None) else f"cpp takes CPU tensors, not {device}"
    if name == "triton":
        if not _TRITON_INSTALLED:
            return "triton is not installed"
        if device == "cuda" or (device in ("cpu", None) and _INTERPRETING):
            return None
        if device is None:
            return None if torch.cuda.is_available() else "no GPU, and the interpreter is off (TRITON_INTERPRET=1)"
        return f"triton takes CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1; these are on {device}"
    if native.LIBRARIES["cuda"].reason is not None:
        return native.LIBRARIES["cuda"].reason
    if device is None:
        return None if torch.cuda.is_available() else "no GPU"
    return None if device == "cuda" else f"cuda takes CUDA tensors, not {device}"


def _declines(op: str, name: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why ``name`` cannot take this call, or None."""
    dtypes = _DTYPES.get((op, name))
    if dtypes is None:
        return f"{op} has no {name} implementation"
    device = None
    for tensor in tensors:
        if tensor is not None:
            device = tensor.device.type
            break
    reason = _absent(name, device) or _MISSING.get((op, name))
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes and tensor.is_floating_point():
            return f"{name} implements {op} for {', '.join(map(_short, dtypes))}, not {_short(tensor.dtype)}"
    limit = _LIMITS.get((op, name))
    return None if limit is None else limit(*tensors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _order(op: str, tensor: Tensor) -> tuple[str, ...]:
    """Backends to try for the automatic choice, best first."""
    if tensor.device.type == "cpu":
        return ("cpp", "reference")
    if tensor.device.type != "cuda":
        return ("reference",)
    preference = _PREFERENCE.get(op, {}).get(_short(tensor.dtype), {})
    numel = tensor.numel()
    size = "small" if numel < 1 << 20 else "medium" if numel < 1 << 24 else "large"
    return ("cuda", "triton", "reference") if preference.get(size) == "cuda" else ("triton", "cuda", "reference")


def _explicit(backend: str | None) -> str | None:
    """The choice of the call, else of the process, else of the environment, else None."""
    if backend is not None:
        return backend
    if _forced is not None:
        return _forced
    found = ENVIRONMENT.get(_VARIABLE)
    if found not in _AS_SET:
        _check_name(os.environ["MEMKERN_BACKEND"], "MEMKERN_BACKEND")
    return _AS_SET[found]


def select(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that takes this call. ``tensors``: the call's tensors, the one that names device and dtype first.

    Raises:
        ValueError: ``backend`` (or ``MEMKERN_BACKEND``) is no known name.
        BackendUnavailable: the explicit choice cannot take the call.
    """
    chosen = _explicit(backend)
    if chosen is not None:
        if chosen not in NAMES:
            _check_name(chosen, "backend")
        if _declines(op, chosen, tensors) is not None:
            raise BackendUnavailable(_refusal(op, chosen, tensors))
        return chosen
    first = tensors[0]
    assert first is not None
    for name in _order(op, first):
        if _declines(op, name, tensors) is None:
            if name == "reference":
                _warn_reference(op, tensors)
            return name
    raise BackendUnavailable(_refusal(op, "automatic", tensors))


def select_on_cpu(op: str, backend: str | None, first: Tensor) -> str:
    """:func:`select` for CPU tensors that all have the dtype of ``first``, from memory where it was asked before.

    For an operator without limits on sizes, and not under torch.compile, which would have to guard the memory.
    """
    key = op, backend, _forced, ENVIRONMENT.get(_VARIABLE), first.dtype
    found = _ON_CPU.get(key)
    if found is None:
        found = _ON_CPU[key] = select(op, backend, first)
    return found


def _refusal(op: str, chosen: str, tensors: tuple[Tensor | None, ...]) -> str:
    shapes = ", ".join(f"{_short(t.dtype)}{list(t.shape)} on {t.device}" for t in tensors if t is not None)
    reasons = "\n".join(f"  {name}: {reason or 'available'}" for name, reason in explain(op, *tensors).items())
    return f"backend {chosen!r} cannot run {op} on ({shapes})\n{reasons}"


def _warn_reference(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Say once per op why a compiled backend that one would expect did not take the call."""
    device = next(t.device.type for t in tensors if t is not None)
    expected = {"cuda": "triton", "cpu": "cpp"}.get(device)
    if torch.compiler.is_compiling() or expected is None or (op, device) in _warned:
        return
    if device == "cpu" and not (native.LIBRARIES["cpu"].broken or (op, "cpp") in _MISSING):
        return
    _warned.add((op, device))
    reasons = "; ".join(f"{name}: {why}" for name, why in explain(op, *tensors).items() if why)
    warnings.warn(f"memkern: {op} runs on the PyTorch reference ({reasons})", RuntimeWarning, stacklevel=4)


def available() -> list[str]:
    """The backends that can run in this process, on some device."""
    return [name for name in NAMES if _absent(name, None) is None]


def explain(op: str, *tensors: Tensor | None) -> dict[str, str | None]:
    """For each backend, None when it takes ``op`` on these tensors, otherwise why it cannot.

    Args:
        op: a public operator's name, such as ``"route_experts"``.
        tensors: the call's tensors; without any, only what holds for every call is checked.

    Raises:
        ValueError: no operator has this name.
    """
    if (op, "reference") not in _DTYPES:
        known = ", ".join(sorted({name for name, _ in _DTYPES}))
        raise ValueError(f"op: unknown operator {op!r}; the known ones are {known}")
    if tensors:
        return {name: _declines(op, name, tensors) for name in NAMES}
    return {
        name: _absent(name, None) or _MISSING.get((op, name))
        if (op, name) in _DTYPES
        else f"{op} has no {name} implementation"
        for name in NAMES
    }
