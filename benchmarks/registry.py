"""One description per public operator: inputs, work, what a user would write instead, peers, targets.

``validate``, ``bench``, ``pytest benchmarks``, the traffic tests and the demo all read it. A column adds a file
``benchmarks/ops/<column>.py`` with a tuple ``SPECS`` of :class:`OpSpec`; it is found by its presence.

A *case* is one operator at one shape, variant and dtype on one device; it makes the keyword arguments of the public
function, and knows the least number of bytes and operations that any implementation needs.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memkern.testing.compare import Comparison, flatten

MODES = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Shape = Mapping[str, int]
Options = Mapping[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Cost:
    """The least traffic with main memory and the arithmetic of one pass."""

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)


@dataclass(frozen=True)
class Work:
    """What one call costs at least.

    Attributes:
        forward: without anything kept for a backward pass.
        backward: reading what was saved included.
        saved: bytes that forward writes in addition when a gradient is needed.
    """

    forward: Cost
    backward: Cost
    saved: int = 0

    def of(self, mode: str) -> Cost:
        """Cost of a mode of :data:`MODES`."""
        if mode == "fwd":
            return self.forward
        if mode == "bwd":
            return self.backward
        return self.forward + self.backward + Cost(0, self.saved, 0)


@dataclass(frozen=True)
class Gemm:
    """``batch`` products (m, k) @ (k, n): the matrix arithmetic of an operator, timed alone as its limit ``"gemm"``."""

    m: int
    n: int
    k: int
    batch: int = 1


@dataclass(frozen=True)
class Target:
    """A speed that the project promises: our fastest backend is at least ``at_least`` times ``over``.

    Attributes:
        over: a provider (``"eager"``, ``"compile"``, a peer), or a measured limit of the machine (``"read"``,
            ``"write"``, ``"copy"``, ``"gemm"``, ``"peak"``), of which ``at_least`` is then the share.
    """

    size: str
    mode: str
    over: str
    at_least: float
    device: str = "cpu"
    dtype: str = "float32"
    variant: str = ""


@dataclass(frozen=True)
class OpSpec:
    """Everything the tools know about one public operator.

    Attributes:
        name: the public function in ``memkern.ops.<column>``; the reference has the same name.
        column: the op family, which names the files.
        shapes: named sizes, by dimension letter. ``tiny`` and those in ``odd`` are for validation, ``small``,
            ``medium`` and ``large`` for benchmarks.
        make: (shape, options, dtype, device, generator) -> keyword arguments of the public function.
        work: (shape, options, dtype) -> least bytes and operations.
        variants: named options for ``make``; the first is the default.
        odd: names of further shapes to validate: tails, single elements, empty batches.
        no_grad: arguments (dotted names) that take no gradient although they are floating.
        eager: what a user writes in plain PyTorch, with the same keyword arguments.
        clean: the form given to torch.compile; ``eager`` when None.
        peers: by name, (case) -> a function with the same keyword arguments. It imports what it needs and raises
            ImportError where that is missing, :class:`Unsuitable` where it cannot take the case.
        judges: for outputs that do not compare element by element (indices with ties), a comparison by output name:
            (actual outputs, true outputs, arguments) -> Comparison.
        dtypes: the dtypes to validate.
        gemms: (shape, options, mode) -> the matrix products that the mode cannot do without; the limit ``"gemm"`` of a
            target is the fastest library's time for them, one after another.
        targets: promised speeds; ``headline`` operators are compared with torch.compile and peers by default.
    """

    name: str
    column: str
    shapes: Mapping[str, Shape]
    make: Callable[[Shape, Options, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    work: Callable[[Shape, Options, torch.dtype], Work]
    eager: Function
    variants: Mapping[str, Options] = field(default_factory=lambda: {"": {}})
    odd: Sequence[str] = ()
    no_grad: frozenset[str] = frozenset()
    clean: Function | None = None
    peers: Mapping[str, Callable[[Case], Function]] = field(default_factory=dict)
    judges: Mapping[str, Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Any]], Comparison]] = field(
        default_factory=dict
    )
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16", "float64")
    gemms: Callable[[Shape, Options, str], Sequence[Gemm]] | None = None
    targets: Sequence[Target] = ()
    headline: bool = False

    @property
    def public(self) -> Function:
        """The operator as users call it."""
        return getattr(importlib.import_module(f"memkern.ops.{self.column}"), self.name)

    @property
    def reference(self) -> Function:
        """Its meaning in plain PyTorch."""
        return getattr(importlib.import_module(f"memkern.reference.{self.column}"), self.name)

    def case(
        self,
        size: str | Shape = "tiny",
        *,
        variant: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> Case:
        """One case of this operator.

        Args:
            size: a name in ``shapes``, or a mapping with every dimension.
            variant: a name in ``variants``, the first when None.

        Raises:
            ValueError: an unknown size, dimension, variant or dtype.
        """
        variant = next(iter(self.variants)) if variant is None else variant
        if variant not in self.variants:
            raise ValueError(_unknown(f"variant of {self.name}", variant, self.variants))
        if dtype not in DTYPES:
            raise ValueError(_unknown("dtype", dtype, DTYPES))
        if isinstance(size, str):
            if size not in self.shapes:
                raise ValueError(_unknown(f"size of {self.name}", size, self.shapes))
            return Case(self, size, dict(self.shapes[size]), variant, dtype, device)
        letters = set(next(iter(self.shapes.values())))
        if set(size) != letters:
            raise ValueError(
                f"shape of {self.name}: expected the dimensions {', '.join(sorted(letters))}, got {dict(size)}"
            )
        return Case(self, format_shape(size), dict(size), variant, dtype, device)

    def validation_sizes(self) -> tuple[str, ...]:
        return "tiny", *self.odd


@dataclass(frozen=True)
class Case:
    """One operator at one shape, variant and dtype on one device."""

    spec: OpSpec
    size: str
    shape: dict[str, int]
    variant: str
    dtype: str
    device: str

    @property
    def options(self) -> Options:
        return self.spec.variants[self.variant]

    @property
    def work(self) -> Work:
        return self.spec.work(self.shape, self.options, DTYPES[self.dtype])

    @property
    def label(self) -> str:
        """Such as ``route_experts max small bfloat16``."""
        return " ".join(part for part in (self.spec.name, self.variant, self.size, self.dtype) if part)

    def arguments(self, *, grad: bool = True, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the public function: random, the same for the same seed and device type.

        Args:
            grad: let every differentiable tensor require a gradient.
        """
        device = torch.device(self.device)
        generator = torch.Generator(device).manual_seed(seed)
        made = self.spec.make(self.shape, self.options, DTYPES[self.dtype], device, generator)
        if grad:
            require_gradients(made, self.spec.no_grad)
        return made


class Unsuitable(Exception):
    """A peer that is installed but cannot take this case; the message says why."""


def require_gradients(arguments: Mapping[str, Any], no_grad: frozenset[str] = frozenset()) -> None:
    """Let every floating tensor in the arguments require a gradient, except those named."""
    for name, tensor in flatten(arguments).items():
        if tensor.is_floating_point() and name not in no_grad:
            tensor.requires_grad_()


def draw(generator: torch.Generator, dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
    """Normal values on the generator's device, drawn in float32 so that every dtype sees the same numbers."""
    values = torch.randn(size, generator=generator, device=generator.device)
    return (values if scale == 1.0 else values.mul_(scale)).to(dtype)


@functools.cache
def specs() -> dict[str, OpSpec]:
    """Every operator that ``benchmarks/ops/*.py`` describes, by name."""
    folder = importlib.import_module("memkern.benchmarks.ops")
    found: dict[str, OpSpec] = {}
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda item: item.name):
        for spec in importlib.import_module(f"memkern.benchmarks.ops.{module.name}").SPECS:
            found[spec.name] = spec
    return found


def spec(name: str) -> OpSpec:
    """The operator of this name.

    Raises:
        ValueError: there is none; the message lists the known ones and the nearest.
    """
    known = specs()
    if name not in known:
        raise ValueError(_unknown("operator", name, known))
    return known[name]


def parse_shape(text: str) -> list[dict[str, int]]:
    """``"B=1,8,64,S=16"`` -> every combination: three shapes here.

    Raises:
        ValueError: not of that form.
    """
    values: dict[str, list[int]] = {}
    letter = ""
    for part in text.replace(" ", "").split(","):
        head, equals, tail = part.rpartition("=")
        if equals:
            letter = head
            values[letter] = []
        if not letter or not tail.isdigit():
            raise ValueError(f"shape: expected something like B=8,S=16 or B=1,8,64 for a sweep, got {text!r}")
        values[letter].append(int(tail))
    shapes: list[dict[str, int]] = [{}]
    for letter, sizes in values.items():
        shapes = [shape | {letter: size} for shape in shapes for size in sizes]
    return shapes


def override(op: OpSpec, base: str, changes: Mapping[str, int]) -> dict[str, int]:
    """The named shape of ``op`` with some dimensions replaced.

    Raises:
        ValueError: the operator has no such size or dimension.
    """
    if base not in op.shapes:
        raise ValueError(_unknown(f"size of {op.name}", base, op.shapes))
    shape = dict(op.shapes[base])
    for letter in changes:
        if letter not in shape:
            raise ValueError(_unknown(f"dimension of {op.name}", letter, shape))
    return shape | dict(changes)


def format_shape(shape: Shape) -> str:
    """``{"B": 8, "S": 16}`` -> ``"B=8,S=16"``."""
    return ",".join(f"{letter}={size}" for letter, size in shape.items())


def validation_cases(
    ops: Sequence[OpSpec], dtypes: Sequence[str], device: str, shape: Mapping[str, int] | None = None
) -> Iterator[Case]:
    """Every operator, variant and dtype at its validation sizes, or at ``tiny`` with some dimensions replaced."""
    for op in ops:
        sizes: Sequence[str | Shape] = op.validation_sizes() if shape is None else [override(op, "tiny", shape)]
        for dtype in dtypes:
            if dtype in op.dtypes:
                for size in sizes:
                    for variant in op.variants:
                        yield op.case(size, variant=variant, dtype=dtype, device=device)


def _unknown(what: str, got: str, known: Any) -> str:
    names = [name for name in known if name]
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}{hint} The known ones are {', '.join(names) or 'none'}".replace("? The", "? the")
