"""Holds an implementation of a case to the float64 reference: outputs and every gradient.

Our backends follow the rule of :mod:`memkern.testing.compare`: at most twice the error of the reference in the same
dtype, plus a few ulp. Peers and plain PyTorch may do their arithmetic in the tensors' own dtype; they have to agree in
half of its digits, which tells another function from a rounder one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memkern.testing.compare import DRAWS, Comparison, compare, flatten, nudge, to_double

from .registry import Function, OpSpec


def named_outputs(result: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a result by name; a bare tensor or sequence takes the reference's names in order.

    Raises:
        TypeError: the result holds no tensors.
    """
    if names is not None and not isinstance(result, Mapping) and not hasattr(result, "_fields"):
        if isinstance(result, Tensor):
            return {names[0]: result}
        if isinstance(result, list | tuple):
            return dict(zip(names, flatten(result).values(), strict=False))
    found = flatten(result)
    if not found:
        raise TypeError(f"expected tensors as result, got {type(result).__name__}")
    return found


def pull_back(
    outputs: Mapping[str, Tensor], arguments: Mapping[str, Any], cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients ``d_<argument>`` of sum <cotangent, output> over the outputs named by ``cotangents``."""
    leaves = {name: leaf for name, leaf in flatten(dict(arguments)).items() if leaf.requires_grad}
    roots = [outputs[name] for name in cotangents]
    seeds = [cotangent.to(outputs[name]) for name, cotangent in cotangents.items()]
    grads = torch.autograd.grad(roots, list(leaves.values()), seeds, allow_unused=True)
    return {
        f"d_{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def without_grad(value: Any) -> Any:
    """The same arguments, detached."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: without_grad(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(without_grad, value))
    if isinstance(value, list | tuple):
        return type(value)(map(without_grad, value))
    return value


class Truth:
    """Outputs and gradients of a case in float64 and in its own dtype, computed once for all implementations."""

    def __init__(self, spec: OpSpec, arguments: dict[str, Any]) -> None:
        self.spec = spec
        self.arguments = arguments
        self._doubled = to_double(arguments)
        truth, baseline = named_outputs(spec.reference(**self._doubled)), named_outputs(spec.reference(**arguments))
        self.names = list(truth)
        generator = torch.Generator().manual_seed(17)
        self.cotangents = {
            name: torch.randn(out.shape, generator=generator, dtype=torch.float64)
            for name, out in truth.items()
            if out.requires_grad
        }
        self._gradients: dict[tuple[str, ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        if self.cotangents:
            self._gradients[tuple(self.cotangents)] = (
                pull_back(truth, self._doubled, self.cotangents),
                pull_back(baseline, arguments, self.cotangents),
            )
        self._drawn: dict[tuple[str, ...], list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = {}
        self.truth = {name: out.detach() for name, out in truth.items()}
        self.baseline = {name: out.detach() for name, out in baseline.items()}

    def check(self, function: Function, *, rounder: bool = False, grad: bool = True) -> list[Comparison]:
        """Compare ``function(**arguments)`` and its gradients, tensor by tensor.

        Args:
            function: takes the arguments of the public function and returns its outputs: all, the first few, or a
                mapping with some of them.
            rounder: hold it to half the digits of its dtype instead of to twice the error of the reference.
            grad: False leaves the gradients out.
        """
        arguments = self.arguments if grad else without_grad(self.arguments)
        outputs = named_outputs(function(**arguments), self.names)
        unknown = [
            Comparison(name, math.inf, 0.0, "the reference has no such output")
            for name in outputs.keys() - set(self.names)
        ]
        outputs = {name: outputs[name] for name in self.names if name in outputs}
        results = [self._output(name, outputs, rounder) for name in outputs]
        shaped = all(outputs[name].shape == self.truth[name].shape for name in outputs)
        if grad and self.cotangents and shaped:
            results += self._check_gradients(outputs, rounder)
        return unknown + results

    def _output(self, name: str, outputs: dict[str, Tensor], rounder: bool) -> Comparison:
        if name in self.spec.judges:
            return self.spec.judges[name](outputs, self.truth, self.arguments)
        actual, truth, baseline = outputs[name].detach(), self.truth[name], self.baseline[name]
        return self._compare(name, actual, truth, baseline, rounder, lambda: self._draws((), name))

    def _check_gradients(self, outputs: dict[str, Tensor], rounder: bool) -> list[Comparison]:
        lost = [name for name in self.cotangents if name in outputs and not outputs[name].requires_grad]
        if lost:
            return [Comparison(f"d({name})", math.inf, 0.0, "this output carries no gradient") for name in lost]
        names = tuple(name for name in self.cotangents if name in outputs)
        if not names:
            return []
        actual = pull_back(outputs, self.arguments, {name: self.cotangents[name] for name in names})
        truth, baseline = self._true_gradients(names)
        return [
            self._compare(name, grad, truth[name], baseline[name], rounder, lambda name=name: self._draws(names, name))  # type: ignore[misc]
            for name, grad in actual.items()
        ]

    def _true_gradients(self, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if names not in self._gradients:
            part = {name: self.cotangents[name] for name in names}
            truth, baseline = (
                pull_back(named_outputs(self.spec.reference(**arguments)), arguments, part)
                for arguments in (self._doubled, self.arguments)
            )
            self._gradients[names] = truth, baseline
        return self._gradients[names]

    def _draws(self, names: tuple[str, ...], name: str) -> list[tuple[Tensor, Tensor]]:
        """An output, or a gradient of the outputs ``names``, in float64 and in its own dtype, on nudged inputs."""
        if names not in self._drawn:
            self._drawn[names] = []
            for seed in range(DRAWS):
                inputs = nudge(self.arguments, seed)
                pair = []
                for arguments in (to_double(inputs), inputs):
                    outputs = named_outputs(self.spec.reference(**arguments))
                    if names:
                        outputs = pull_back(outputs, arguments, {n: self.cotangents[n] for n in names})
                    pair.append({n: value.detach() for n, value in outputs.items()})
                self._drawn[names].append((pair[0], pair[1]))
        return [(true[name], other[name]) for true, other in self._drawn[names]]

    def _compare(
        self,
        name: str,
        actual: Tensor,
        truth: Tensor,
        baseline: Tensor,
        rounder: bool,
        draws: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    ) -> Comparison:
        if not rounder:
            return compare(name, actual, truth, baseline, draws=draws)
        if actual.is_floating_point():
            actual = actual.to(baseline.dtype)
        held = compare(name, actual, truth, baseline)
        if held.note or not actual.is_floating_point() or actual.numel() == 0:
            return held
        eps = max(torch.finfo(t.dtype).eps for t in flatten(self.arguments).values() if t.is_floating_point())
        scale = truth[truth.isfinite()].abs().amax().item() if bool(truth.isfinite().any()) else 0.0
        return dataclasses.replace(held, bound=max(held.bound, math.sqrt(eps) * scale))


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The comparison nearest to its bound, or furthest beyond it."""
    return max(comparisons, key=closeness)


def closeness(comparison: Comparison) -> float:
    """Error as a share of the bound: above 1 fails."""
    if comparison.note:
        return math.inf
    if comparison.bound == 0.0:
        return 0.0 if comparison.error == 0.0 else math.inf
    return comparison.error / comparison.bound
