"""The full models: ordinary transformers models, registered with its Auto classes when their module is imported."""

import importlib
from typing import Any

_MODULES = ("gmm_xlnet", "hybrid", "memxlnet", "self_rag")

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"memkern.models.{name}")
    raise AttributeError(f"module 'memkern.models' has no attribute {name!r}")
