"""Finds and loads the compiled operator libraries, and says why one is not there.

``memkern/_ops_cpu.so`` and ``memkern/_ops_cuda.so`` bind through torch's stable ABI and register their kernels under
``torch.ops.memkern``; the package works without either. A library that does not load, or that was built from another
version of memkern, never breaks the import: it is reported by ``memkern info`` and at its first use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import memkern
from memkern._interface import interface

REPAIR = (
    "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps memkern (in a checkout: make build)"
)


CSRC = Path(__file__).resolve().parents[1] / "csrc"
"""The sources of the libraries, in a checkout."""


@dataclass(frozen=True)
class Library:
    """One operator library: loaded when ``reason`` is None, otherwise ``reason`` says why not."""

    name: str
    path: Path
    reason: str | None
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.reason is None

    @property
    def broken(self) -> bool:
        """Built, but unusable: worth a warning, where a library that was never built is not."""
        return self.reason is not None and self.path.exists()


def load(name: str, folder: Path | None = None) -> Library:
    """Load ``_ops_<name>.so`` from ``folder`` (the package's own by default) and compare what it was built for."""
    path = (folder or Path(__file__).parent) / f"_ops_{name}.so"
    if not path.exists():
        return Library(name, path, f"the {name} library was not built ({path.name} is missing)")
    if name == "cuda" and torch.version.cuda is None:
        return Library(
            name, path, f"{path.name} needs a CUDA build of torch; torch {torch.__version__} has none. {REPAIR}"
        )
    try:
        torch.ops.load_library(str(path))
        build = json.loads(getattr(torch.ops.memkern, f"build_info_{name}")())
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        return Library(name, path, f"{path.name} does not load under torch {torch.__version__}: {first_line}. {REPAIR}")
    return Library(name, path, mismatch(name, build), build)


def mismatch(name: str, build: dict[str, Any]) -> str | None:
    """Why a library with this build metadata must not be used here, or None. Both versions are named."""
    if build.get("memkern") != memkern.__version__:
        return (
            f"_ops_{name}.so was built from memkern {build.get('memkern')}, "
            f"but the Python files are memkern {memkern.__version__}. {REPAIR}"
        )
    if name == "cuda" and str(build.get("cuda", "")).split(".")[0] != str(torch.version.cuda).split(".")[0]:
        return f"_ops_cuda.so was built with CUDA {build.get('cuda')}, torch has CUDA {torch.version.cuda}. {REPAIR}"
    there, built = interface(CSRC, name), build.get("interface", {}).get(name)
    if there is not None and built != there:
        return f"_ops_{name}.so was built from bindings {built}, but this checkout has {there}. {REPAIR}"
    return None


LIBRARIES: dict[str, Library] = {name: load(name) for name in ("cpu", "cuda")}
