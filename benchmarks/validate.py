"""Checks every operator, forward and every gradient, against the float64 reference; `memkern validate` prints it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import memkern
from memkern import backends
from memkern.backends import BackendUnavailable
from memkern.testing.compare import Comparison

from . import golden, inputs
from .checking import Truth, worst
from .registry import DTYPES, Case, Function, OpSpec, spec, validation_cases


@dataclass
class Checked:
    """One implementation on one case: its comparisons, or why it did not take the case."""

    op: str
    variant: str
    size: str
    dtype: str
    implementation: str
    device: str
    comparisons: list[Comparison] = field(default_factory=list)
    declined: str = ""
    saved: str = ""

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison:
        return worst(self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "variant": self.variant,
            "size": self.size,
            "dtype": self.dtype,
            "implementation": self.implementation,
            "device": self.device,
            "verdict": "declined" if self.declined else "pass" if self.passed else "FAIL",
            "declined": self.declined,
            "saved_inputs": self.saved,
            "tensors": [
                {
                    "name": c.name,
                    # JSON has no infinity.
                    "error": c.error if math.isfinite(c.error) else None,
                    "bound": c.bound,
                    "note": c.note,
                    "verdict": "pass" if c.passed else "FAIL",
                }
                for c in self.comparisons
            ],
        }


@dataclass(frozen=True)
class Implementation:
    """Something that computes an operator: one of our backends, or a function of the user's."""

    name: str
    device: str
    function: Callable[[OpSpec], Function]
    rounder: bool = False
    grad: bool = True


def ours(name: str, device: str | None = None) -> Implementation:
    """A backend of memkern, on the device its tensors live on."""
    return Implementation(name, device or backend_device(name), lambda op: on_backend(op.public, name))


def theirs(path: str, device: str, *, rounder: bool = False, grad: bool = True) -> Implementation:
    """The function ``package.module:function``."""
    function = import_function(path)
    return Implementation(path, device, lambda op: function, rounder, grad)


def on_backend(function: Function, backend: str) -> Function:
    """``function`` on one backend; a function without that choice as it is."""
    if "backend" not in inspect.signature(function).parameters:
        return function
    return lambda **arguments: function(**arguments, backend=backend)


def backend_device(backend: str) -> str:
    """The device on which a backend is to be checked here: the GPU, except for C++ and without one."""
    return "cuda" if backend != "cpp" and torch.cuda.is_available() else "cpu"


def here(names: Sequence[str] = ()) -> list[str]:
    """The backends to check: those named, each of which has to be there, or all that are.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: a named one is not there, with every backend's reason.
    """
    present = backends.available()
    for name in names:
        if name not in backends.NAMES:
            raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(backends.NAMES)}")
        if name not in present:
            reasons = "\n".join(f"  {n}: {why or 'available'}" for n, why in backends.explain("route_experts").items())
            raise BackendUnavailable(f"backend {name!r} is not available here\n{reasons}")
    return list(names) or present


def import_function(path: str) -> Function:
    """The function at ``package.module:function``; the working directory is searched too.

    Raises:
        ValueError: not of that form, no such module, or no such function in it.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"expected package.module:function, got {path!r}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ValueError(f"no module named {error.name!r} (searched in {folder} and sys.path)") from error
        raise
    except AttributeError as error:
        raise ValueError(f"module {module_name} has no {attribute!r}") from error
    if not callable(found):
        raise ValueError(f"{path} is not a function but a {type(found).__name__}")
    return found


def validate(
    specs: Sequence[OpSpec],
    implementations: Sequence[Implementation],
    dtypes: Sequence[str],
    *,
    shape: Mapping[str, int] | None = None,
    save_to: Path | None = None,
) -> Iterator[Checked]:
    """Check the implementations on every case, one result each, as they come.

    Args:
        dtypes: names; an operator is checked in those of them that its spec lists.
        shape: replaces dimensions of the ``tiny`` shape; the spec's validation shapes when None.
        save_to: folder for the inputs of a failure.
    """
    for device in dict.fromkeys(implementation.device for implementation in implementations):
        there = [implementation for implementation in implementations if implementation.device == device]
        for case in validation_cases(specs, dtypes, device, shape):
            yield from check_case(case, case.arguments(), there, save_to)


def check_case(
    case: Case, arguments: dict[str, Any], implementations: Sequence[Implementation], save_to: Path | None = None
) -> Iterator[Checked]:
    """Check the implementations on one case's arguments; the truth is computed once."""
    truth = Truth(case.spec, arguments)
    for implementation in implementations:
        checked = Checked(
            case.spec.name, case.variant, case.size, case.dtype, implementation.name, implementation.device
        )
        try:
            checked.comparisons = truth.check(
                implementation.function(case.spec), rounder=implementation.rounder, grad=implementation.grad
            )
        except BackendUnavailable as error:
            checked.declined = reason_of(error, implementation.name)
        except Exception as error:  # whatever an implementation raises is its verdict
            checked.comparisons = [Comparison("call", math.inf, 0.0, f"{type(error).__name__}: {first_line(error)}")]
        if save_to is not None and not checked.passed:
            parts = (case.spec.name, case.variant, case.dtype, case.size, implementation.name)
            stem = "-".join(part for part in parts if part)
            path = save_to / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in stem)}.safetensors"
            inputs.save(path, case, arguments)
            checked.saved = str(path)
        yield checked


def validate_saved(path: Path, implementations: Sequence[Implementation]) -> Iterator[Checked]:
    """Check the implementations on the inputs that an earlier failure saved.

    Raises:
        ValueError: not such a file.
    """
    for implementation in implementations:
        about, arguments = inputs.load(path, implementation.device)
        case = spec(about["op"]).case(
            about["shape"], variant=about["variant"], dtype=about["dtype"], device=implementation.device
        )
        yield from check_case(case, arguments, [implementation])


def validate_golden(
    implementations: Sequence[Implementation], dtypes: Sequence[str], ops: Sequence[str] = ()
) -> Iterator[Checked]:
    """Check the golden numbers, in those of ``dtypes`` whose precision they have (float32 and float64)."""
    for number, case in enumerate(golden.golden_cases()):
        if ops and case["op"] not in ops:
            continue
        function = getattr(memkern.ops, case["op"])
        column = function.__module__.split(".")[2]
        for implementation in implementations:
            called = implementation.function(_GoldenSpec(case["op"], column, function))  # type: ignore[arg-type]
            for dtype in dtypes:
                if dtype not in ("float32", "float64"):
                    continue
                checked = Checked(
                    case["op"], "golden", str(number + 1), dtype, implementation.name, implementation.device
                )
                try:
                    checked.comparisons = golden.check_golden(case, called, DTYPES[dtype], implementation.device)
                except BackendUnavailable as error:
                    checked.declined = reason_of(error, implementation.name)
                except Exception as error:  # as above
                    note = f"{type(error).__name__}: {first_line(error)}"
                    checked.comparisons = [Comparison("call", math.inf, 0.0, note)]
                yield checked


@dataclass(frozen=True)
class _GoldenSpec:
    """As much of a spec as an implementation needs; a golden case may belong to an operator without one."""

    name: str
    column: str
    public: Function


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def reason_of(error: BackendUnavailable, backend: str) -> str:
    """The line of the refusal that speaks of this backend."""
    for line in str(error).splitlines():
        if line.strip().startswith(f"{backend}:"):
            return line.strip().removeprefix(f"{backend}:").strip()
    return first_line(error)
