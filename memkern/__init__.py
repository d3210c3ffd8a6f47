"""memkern: fused operators for memory-augmented transformers, and the models built on them.

Importing it starts no GPU and imports neither triton nor transformers. Heavy parts load at their first use.
"""

__version__ = "0.1.0"

import importlib
from typing import Any

from memkern import backends, ops
from memkern.backends import BackendUnavailable, use_backend

__all__ = ["BackendUnavailable", "__version__", "backends", "ops", "use_backend", "warmup"]

_LAZY_MODULES = ("analysis", "benchmarks", "data", "models", "nn", "patch", "reference", "store", "testing", "training")


def __getattr__(name: str) -> Any:
    if name == "warmup":
        return importlib.import_module("memkern._warmup").warmup
    if name in _LAZY_MODULES:
        return importlib.import_module(f"memkern.{name}")
    raise AttributeError(f"module 'memkern' has no attribute {name!r}")
