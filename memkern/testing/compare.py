"""Tolerances by rule: a kernel may be at most twice as wrong as plain PyTorch in the same dtype, plus a few ulp.

The truth is the float64 reference on the same (already rounded) inputs; the baseline is the reference in the kernel's
own dtype. One baseline can be right by luck, where terms cancel: before a result is refused, the reference is asked on
inputs that are one rounding away, and the most that its own dtype costs there counts too. Nothing is tuned by operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One tensor against the truth: ``error`` and ``bound`` are maxima of absolute differences."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.note and self.error <= self.bound


DRAWS = 4
# Of the largest true value, in units of eps: the most that other draws may say the reference is wrong by. It leaves
# room for cancellation, and none for a discrete choice that falls differently in another dtype.
DRAWN_ULPS = 16.0


def compare(
    name: str,
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    ulps: float = 4.0,
    draws: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
) -> Comparison:
    """Hold ``actual`` to max|actual - truth| <= 2 max|baseline - truth| + ulps * eps * max|truth|.

    Args:
        actual: result of the kernel under test; its dtype gives eps.
        truth: the float64 result.
        baseline: the same-dtype result of the reference.
        ulps: the few units in the last place that any order of summation may cost. In float64 the truth was rounded
            as the result was and stands in for the baseline: as many more for each of the three terms.
        draws: makes (truth, baseline) on inputs that :func:`nudge` moved; called only if ``actual`` is out of bounds.
            Their largest difference, at most ``DRAWN_ULPS`` * eps * max|truth|, then stands beside this baseline's.
    """
    if actual.shape != truth.shape:
        return Comparison(name, float("inf"), 0.0, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.dtype != baseline.dtype:
        return Comparison(name, float("inf"), 0.0, f"dtype {actual.dtype}, expected {baseline.dtype}")
    if actual.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    if not actual.is_floating_point():
        wrong = int((actual.cpu() != truth.cpu()).sum())
        return Comparison(name, float(wrong), 0.0)
    a, t, b = (x.detach().cpu().double() for x in (actual, truth, baseline))
    if not torch.equal(a.isnan(), t.isnan()) or not torch.equal(a.isinf(), t.isinf()):
        return Comparison(name, float("inf"), 0.0, "NaN or infinity in other places than the truth")
    finite = t.isfinite() & b.isfinite()
    if not bool(finite.any()):
        return Comparison(name, 0.0, 0.0)
    a, t, b = a[finite], t[finite], b[finite]
    error = (a - t).abs().max().item()
    unit = torch.finfo(actual.dtype).eps * t.abs().max().item()
    few = (4 * ulps if actual.dtype == torch.float64 else ulps) * unit
    off = (b - t).abs().max().item()
    if draws is not None and error > 2 * off + few:
        drawn = max((other.double() - true).abs()[finite.to(true.device)].max().item() for true, other in draws())
        off = max(off, min(drawn, DRAWN_ULPS * unit))
    return Comparison(name, error, 2 * off + few)


def to_double(value: Any) -> Any:
    """Floating tensors as float64 leaves that keep ``requires_grad``; everything else as it is."""
    return _map_floating(value, lambda x: x.detach().double())


def nudge(value: Any, seed: int) -> Any:
    """The same tensors, every floating element off by one rounding of its dtype, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps
        up = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) < 0.5
        return (x.detach().double() * torch.where(up, 1 + eps, 1 - eps)).to(x.dtype)

    return _map_floating(value, moved)


def _map_floating(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return change(value).requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {name: _map_floating(item, change) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_floating(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_floating(item, change) for item in value)
    return value


def outputs_and_gradients(
    function: Callable[..., Any], arguments: Mapping[str, Any], cotangents: list[Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Call ``function(**arguments)`` and pull random cotangents back to every tensor that requires a gradient.

    Returns:
        outputs by name, gradients by argument name, and the cotangents, so that a second run can use the same.
    """
    result = function(**arguments)
    outputs = flatten(result)
    floating = [out for out in outputs.values() if out.is_floating_point() and out.requires_grad]
    if cotangents is None:
        generator = torch.Generator().manual_seed(17)
        cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in floating]
    leaves = {name: leaf for name, leaf in flatten(dict(arguments)).items() if leaf.requires_grad}
    gradients: dict[str, Tensor] = {}
    if leaves and floating:
        pulled = torch.autograd.grad(
            floating,
            list(leaves.values()),
            [c.to(out) for c, out in zip(cotangents, floating, strict=True)],
            allow_unused=True,
        )
        gradients = {
            f"d_{name}": torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), pulled, strict=True)
        }
    return {name: out.detach() for name, out in outputs.items()}, gradients, cotangents


def flatten(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested tuples, named tuples, lists and dicts, by dotted name."""
    if isinstance(value, Tensor):
        return {prefix or "out": value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    items: Any = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def check(
    function: Callable[..., Any], reference: Callable[..., Any], arguments: Mapping[str, Any], *, ulps: float = 4.0
) -> list[Comparison]:
    """Outputs and all gradients of ``function`` against the reference in float64 and in the arguments' own dtype."""
    truth, truth_grads, cotangents = outputs_and_gradients(reference, to_double(arguments))
    baseline, baseline_grads, _ = outputs_and_gradients(reference, arguments, cotangents)
    actual, actual_grads, _ = outputs_and_gradients(function, arguments, cotangents)
    missing = [
        Comparison(name, float("inf"), 0.0, "missing")
        for name in (truth | truth_grads).keys() - (actual | actual_grads).keys()
    ]

    @functools.cache
    def draws() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        made = []
        for seed in range(DRAWS):
            inputs = nudge(arguments, seed)
            both = [outputs_and_gradients(reference, x, cotangents) for x in (to_double(inputs), inputs)]
            made.append((both[0][0] | both[0][1], both[1][0] | both[1][1]))
        return made

    return missing + [
        compare(
            name,
            value,
            (truth | truth_grads)[name],
            (baseline | baseline_grads)[name],
            ulps=ulps,
            draws=lambda name=name: [(true[name], other[name]) for true, other in draws()],  # type: ignore[misc]
        )
        for name, value in (actual | actual_grads).items()
    ]


def assert_matches(
    function: Callable[..., Any], reference: Callable[..., Any], arguments: Mapping[str, Any], *, ulps: float = 4.0
) -> None:
    """:func:`check`, raising AssertionError with every tensor that is out of bounds."""
    failed = [c for c in check(function, reference, arguments, ulps=ulps) if not c.passed]
    if failed:
        lines = "\n".join(f"  {c.name}: error {c.error:.3g} > bound {c.bound:.3g} {c.note}" for c in failed)
        raise AssertionError(f"out of bounds against the float64 reference:\n{lines}")
