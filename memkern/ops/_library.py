"""Registers an operator once and for every backend: one schema text, one fake, three names.

``define("route_experts_fwd", "(Tensor hiddens) -> Tensor", fake)`` makes ``memkern::route_experts_fwd_cpp``,
``_triton`` and ``_cuda``. C++ adds the first and the last when its library is loaded. The Triton launcher of the same
name in ``memkern.triton_kernels.<column>`` is imported at its first call, so that importing memkern imports no Triton.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memkern", "FRAGMENT")
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def define(
    op: str, schema: str, fake: Callable[..., Any], *, column: str | None = None
) -> dict[str, Callable[..., Any]]:
    """Define ``memkern::<op>_<backend>`` for the compiled backends and return the callables by backend name.

    Args:
        op: name without backend, such as ``"route_experts_fwd"``.
        schema: arguments and returns in torch's schema language, shared by all backends.
        fake: computes empty outputs from the same arguments; shared by all backends.
        column: module of ``memkern.triton_kernels`` with the launcher; by default the module name of ``fake``.
    """
    module = column or fake.__module__.rpartition(".")[2]
    table: dict[str, Callable[..., Any]] = {}
    for backend in ("cpp", "triton", "cuda"):
        name = f"{op}_{backend}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, fake, "Meta")
        table[backend] = getattr(torch.ops.memkern, name).default
    for key in ("CUDA", "CPU") if _INTERPRETING else ("CUDA",):
        LIBRARY.impl(f"{op}_triton", _launcher(module, op), key)
    return table


def _launcher(module: str, op: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"memkern.triton_kernels.{module}"), op)(*args)

    return launch


def in_plain_eager() -> bool:
    """Nothing around the call: no compiler that traces it, no functorch transform, no forward-mode AD."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def needs_reference() -> bool:
    """True inside a functorch transform or forward-mode AD, which only the composite reference supports.

    Under Dynamo functorch's stack is never empty; asking it there would silently compile the reference instead.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def accumulator(x: Tensor) -> torch.dtype:
    """What ``x`` is computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
