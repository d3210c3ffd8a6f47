"""The golden numbers of ``memkern/reference/golden.json``, checked on our backends or on anybody's implementation."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memkern.reference
from memkern.testing.compare import Comparison, flatten

from .checking import named_outputs
from .registry import Function


def golden_cases(op: str | None = None) -> Iterator[dict[str, Any]]:
    """The cases of the file, those of one operator when ``op`` is given."""
    path = Path(memkern.reference.__file__ or "").parent / "golden.json"
    for case in json.loads(path.read_text())["cases"]:
        if op is None or case["op"] == op:
            yield case


def check_golden(case: Mapping[str, Any], function: Function, dtype: torch.dtype, device: str) -> list[Comparison]:
    """Call ``function`` on the arguments of a golden case; every expected output within the case's ``atol``."""
    arguments = {name: tensors(value, dtype, device) for name, value in case["arguments"].items()}
    expected = flatten({name: expectation(value) for name, value in case["expected"].items()})
    actual = named_outputs(function(**arguments), list(expected))
    return [_compare(name, actual.get(name), truth, float(case["atol"])) for name, truth in expected.items()]


def _compare(name: str, actual: Tensor | None, truth: Tensor, atol: float) -> Comparison:
    if actual is None:
        return Comparison(name, float("inf"), atol, "missing")
    if actual.shape != truth.shape:
        return Comparison(name, float("inf"), atol, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    error = (actual.detach().cpu().double() - truth.double()).abs().amax() if truth.numel() else torch.zeros(())
    note = "NaN" if bool(error.isnan()) else ""
    return Comparison(name, error.item(), atol, note)


def tensors(value: Any, dtype: torch.dtype, device: str) -> Any:
    """Nested lists as tensors (whole numbers int64, truth values bool, others ``dtype``), mappings as named tuples."""
    if isinstance(value, Mapping):
        return _named({name: tensors(item, dtype, device) for name, item in value.items()})
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [tensors(item, dtype, device) for item in value]
    if isinstance(value, list):
        made = torch.tensor(value, dtype=torch.float64 if _holds_float(value) else None)
        return made.to(device, dtype if made.is_floating_point() else None)
    return value


def expectation(value: Any) -> Any:
    """An expected output as tensors; a bare number is a tensor without axes."""
    if isinstance(value, Mapping):
        return {name: expectation(item) for name, item in value.items()}
    if isinstance(value, int | float):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return tensors(value, torch.float64, "cpu")


def _holds_float(value: Any) -> bool:
    return any(map(_holds_float, value)) if isinstance(value, list) else isinstance(value, float)


def _named(fields: dict[str, Any]) -> Any:
    """The named tuple of the references that has exactly these fields, else the mapping itself."""
    for info in pkgutil.iter_modules(memkern.reference.__path__):
        for candidate in vars(importlib.import_module(f"memkern.reference.{info.name}")).values():
            if isinstance(candidate, type) and set(getattr(candidate, "_fields", ())) == set(fields):
                return candidate(**fields)
    return fields
