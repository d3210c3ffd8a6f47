"""Who can run a case: our backends, plain PyTorch, torch.compile, installed peers, and functions of the user's."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memkern import backends

from .checking import Truth, worst
from .registry import DTYPES, MODES, Case, Function, Unsuitable
from .timing import Call
from .validate import import_function, on_backend

# A case with more elements than this is checked at its small shape: the float64 truth would not fit, or last too long.
_CHECK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Provider:
    """Something that computes the operator. ``ours`` is held to the strict rule of :mod:`memkern.testing.compare`."""

    name: str
    ours: bool
    function: Callable[[Case], Function]


def names_for(case: Case) -> list[str]:
    """Every provider that knows this operator, whether or not it can run here."""
    return [*backends.NAMES, "eager", "compile", *case.spec.peers]


def default_names(case: Case) -> list[str]:
    """Our compiled backends on this device and plain PyTorch; compile and peers too for a headline operator."""
    ours = [name for name in ("cpp", "triton", "cuda") if _runs_fast(name, case.device)]
    others = ["eager", "compile", *case.spec.peers] if case.spec.headline else ["eager"]
    return (ours or ["reference"]) + others


def _runs_fast(name: str, device: str) -> bool:
    """Triton on CPU tensors is its interpreter, which tells nothing about speed."""
    return name in backends.available() and (device == "cuda") == (name in ("triton", "cuda"))


def provider(name: str) -> Provider:
    """The provider of this name, or the function ``package.module:function``."""
    if ":" in name:
        function = import_function(name)
        return Provider(name, False, lambda case: function)
    if name in backends.NAMES:
        return Provider(name, True, lambda case: _on_backend(case, name))
    if name == "eager":
        return Provider(name, False, lambda case: case.spec.eager)
    if name == "compile":
        return Provider(name, False, _compiled)
    return Provider(name, False, lambda case: _peer(case, name))


def _on_backend(case: Case, name: str) -> Function:
    reason = backends.explain(case.spec.name)[name]
    if reason is not None:
        raise Unsuitable(reason)
    return on_backend(case.spec.public, name)


def _compiled(case: Case) -> Function:
    # The shapes of earlier cases count as recompilations; past eight of them the function would run uncompiled.
    torch.compiler.reset()
    return torch.compile(case.spec.clean or case.spec.eager, dynamic=False)


def _peer(case: Case, name: str) -> Function:
    if name not in case.spec.peers:
        raise Unsuitable(f"{case.spec.name} has no provider {name!r}; it has {', '.join(names_for(case))}")
    try:
        return case.spec.peers[name](case)
    except ImportError as error:
        raise Unsuitable(f"not installed: {error.name or error}") from error


def checked_shape(case: Case) -> Case:
    """The case at which a provider is compared before it is timed: itself, or with dimensions as small as ``small``."""
    arguments = case.arguments(grad=False, seed=1) if _elements(case) <= _CHECK_ELEMENTS else None
    if arguments is not None:
        return case
    small = case.spec.shapes.get("small", case.spec.shapes["tiny"])
    shape = {letter: min(size, small[letter]) for letter, size in case.shape.items()}
    return case.spec.case(shape, variant=case.variant, dtype=case.dtype, device=case.device)


def _elements(case: Case) -> int:
    """An upper bound of what a case holds, by its least traffic."""
    return case.work.forward.bytes // DTYPES[case.dtype].itemsize


class Judge:
    """Holds every provider of a case to the same truth, forward and, where it is timed, backward."""

    def __init__(self, case: Case) -> None:
        self.case = checked_shape(case)
        self.truth = Truth(self.case.spec, self.case.arguments())

    def verdict(self, provider: Provider, modes: Sequence[str]) -> tuple[bool, str]:
        """Whether the provider agrees, and in words: the worst error beside its bound and the shape."""
        function = provider.function(self.case)
        grad = any(mode != "fwd" for mode in modes)
        comparisons = self.truth.check(function, rounder=not provider.ours, grad=grad)
        if not comparisons:
            return False, "it returned nothing to compare"
        bad = worst(comparisons)
        where = "" if self.case.size == "small" else f" at {self.case.size}"
        note = f" {bad.note}" if bad.note else ""
        passed = all(comparison.passed for comparison in comparisons)
        return passed, f"{bad.name} {bad.error:.1e} of {bad.bound:.1e}{where}{note}"


def make_call(case: Case, function: Function, mode: str, arguments: dict[str, Any] | None = None) -> Call:
    """A call without arguments that runs one mode of :data:`MODES`, on fresh inputs of the case if none are given.

    ``bwd`` keeps the graph of one forward pass and runs backward through it again and again.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if arguments is None:
        arguments = case.arguments(grad=mode != "fwd")
    if mode == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return function(**arguments)

        return forward
    from memkern.testing.compare import flatten

    leaves = [leaf for leaf in flatten(arguments).values() if leaf.requires_grad]
    first = function(**arguments)
    pick = _root_picker(first)
    roots = pick(first)
    seeds = [torch.ones_like(root) for root in roots]
    if mode == "bwd":
        return lambda: torch.autograd.grad(roots, leaves, seeds, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(pick(function(**arguments)), leaves, seeds, allow_unused=True)


def _root_picker(result: object) -> Callable[[Any], list[torch.Tensor]]:
    """A function that takes from a result like this one the tensors that have a gradient, in no time to speak of."""
    paths = list(_root_paths(result))
    if all(len(path) == 1 for path in paths):
        keys = [path[0] for path in paths]
        return lambda found: [found[key] for key in keys]
    return lambda found: [functools.reduce(operator.getitem, path, found) for path in paths]


def _root_paths(result: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(result, torch.Tensor):
        if result.is_floating_point() and result.requires_grad:
            yield path
        return
    items = result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, Sequence) else ()
    for key, item in items:
        yield from _root_paths(item, (*path, key))
