"""What every reference shares: the dtype it computes in, and a region in which autocast does not lower it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when a tensor is float64, else float32: the dtype in which every operator does its arithmetic."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off on the tensor's device, so that a float32 product stays one."""
    # Meta tensors, which no autocast knows, make torch raise where it asks.
    if not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()
