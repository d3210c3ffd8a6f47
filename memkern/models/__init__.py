"""The full models: ordinary transformers models, registered with its Auto classes when their module is imported."""

import importlib
from typing import Any

_MODULES = ("gmm_xlnet", "hybrid", "memxlnet", "self_rag")
_CLASSES = {
    "GMMXLNetConfig": "gmm_xlnet",
    "GMMXLNetForQA": "gmm_xlnet",
    "MemXLNetConfig": "memxlnet",
    "MemXLNetForQA": "memxlnet",
}

__all__ = [*_MODULES, *_CLASSES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"memkern.models.{name}")
    if name in _CLASSES:
        return getattr(importlib.import_module(f"memkern.models.{_CLASSES[name]}"), name)
    raise AttributeError(f"module 'memkern.models' has no attribute {name!r}")
