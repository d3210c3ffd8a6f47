"""Fills memory that nobody has written yet: a kernel that reads it gives a wrong answer instead of a lucky one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``empty``, ``empty_like``, ``new_empty`` and ``empty_strided`` give NaN, integers their maximum, bool True.

    PyTorch's own allocation functions do it, so that the scratch memory of C++ operators and Triton launchers is
    poisoned too. An operation of PyTorch that is not deterministic warns inside the region.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
