"""Swap hand-written memory modules of a loaded model for our operators, in one line and back.

>>> memkern.patch(model)      # doctest: +SKIP
['gating_network: MemoryGatingNetwork', 'expert_updater: ExpertUpdater']

A module is a candidate by its parts (a router's ``routing_projection``, an updater's ``gate_networks``), whatever its
class. Before it is swapped it has to agree with the operator on random inputs; one that does not stays, with a warning.
Parameters, names, hooks and state dicts are untouched: only the class of the instance changes, to a subclass of its own
whose name ``print(model)`` shows, and :func:`unpatch` changes it back.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memkern import backends
from memkern.nn._stacked import pack
from memkern.nn.gating import POOLINGS, MemoryGatingNetwork
from memkern.nn.reader import ROUTING_MODES, AggregatedMemoryReader
from memkern.nn.updater import ExpertUpdater

__all__ = ["patch", "patched_modules", "unpatch"]

_PREFIX = "Memkern"
_classes: dict[tuple[type, str | None], type] = {}


@dataclass(frozen=True)
class _Rule:
    """One kind of hand-written module: how to know it, what replaces its methods, and inputs to compare on."""

    ours: type[nn.Module]
    methods: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    inputs: Callable[[nn.Module, Callable[..., Tensor]], tuple[Any, ...]]
    prepare: Callable[[nn.Module], None] = lambda module: None


def _is_router(module: nn.Module) -> bool:
    projection = getattr(module, "routing_projection", None)
    if not isinstance(projection, nn.Linear) or getattr(module, "pooling_method", None) not in POOLINGS:
        return False
    if module.pooling_method == "attention" and not isinstance(getattr(module, "pool_query", None), nn.Parameter):
        return False
    temperature = getattr(module, "temperature", None)
    return isinstance(temperature, int | float) and getattr(module, "hidden_dim", None) == projection.in_features


def _is_updater(module: nn.Module) -> bool:
    width, count = getattr(module, "hidden_dim", None), getattr(module, "num_experts", None)
    for name in ("gate_networks", "update_networks"):
        layers = getattr(module, name, None)
        if not isinstance(layers, nn.ModuleList) or len(layers) != count or count == 0:
            return False
        for layer in layers:
            if not isinstance(layer, nn.Linear) or layer.bias is None:
                return False
            if (layer.out_features, layer.in_features) != (width, 2 * layer.out_features):
                return False
    return True


def _is_reader(module: nn.Module) -> bool:
    return (
        getattr(module, "routing_mode", None) in ROUTING_MODES
        and hasattr(module, "read_gating_network")
        and isinstance(getattr(module, "hidden_dim", None), int)
        and isinstance(getattr(module, "num_experts", None), int)
    )


def _probabilities(module: Any, draw: Callable[..., Tensor]) -> Tensor:
    return torch.softmax(draw(2, module.num_experts), -1)


def _experts(module: Any, draw: Callable[..., Tensor]) -> list[Tensor]:
    return [draw(2, 3, module.hidden_dim) for _ in range(module.num_experts)]


def _reader_inputs(module: Any, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    if module.routing_mode == "write-based":
        return _experts(module, draw), _probabilities(module, draw)
    return _experts(module, draw), None, draw(2, 3, module.hidden_dim)


def _pack_updater(module: Any) -> None:
    for layers in (module.gate_networks, module.update_networks):
        pack([layer.weight for layer in layers])
        pack([layer.bias for layer in layers])


_RULES = (
    _Rule(MemoryGatingNetwork, ("forward", "route"), _is_router, lambda m, draw: (draw(2, 3, m.hidden_dim),)),
    _Rule(
        ExpertUpdater,
        ("forward", "update"),
        _is_updater,
        lambda m, draw: (_experts(m, draw), draw(2, 3, m.hidden_dim), _probabilities(m, draw)),
        _pack_updater,
    ),
    _Rule(AggregatedMemoryReader, ("forward", "aggregate"), _is_reader, _reader_inputs),
)


def patch(model: nn.Module, backend: str | None = None) -> list[str]:
    """Swap what is hand-written in ``model`` for our operators.

    Args:
        model: a loaded model, on any device; it is changed in place.
        backend: of the operators; see :mod:`memkern.backends`.

    Returns:
        "name: class" of every module that was swapped.

    Raises:
        ValueError: ``backend`` is unknown.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: unknown backend {backend!r}; the known ones are {', '.join(backends.NAMES)}")
    swapped = []
    for name, module in model.named_modules():
        rule = next((rule for rule in _RULES if rule.matches(module)), None)
        if rule is None or isinstance(module, rule.ours) or hasattr(type(module), "_memkern_original"):
            continue
        original = type(module)
        replacement = _replacement(original, rule, backend)
        difference = _difference(module, replacement, rule)
        if difference is not None:
            warnings.warn(f"{name or 'model'}: {original.__name__} is left as it is: {difference}", stacklevel=2)
            continue
        module.__class__ = replacement
        rule.prepare(module)
        swapped.append(f"{name}: {original.__name__}")
    return swapped


def unpatch(model: nn.Module) -> list[str]:
    """Give every swapped module of ``model`` its own class back; returns their names as :func:`patch` does."""
    restored = []
    for name, module in patched_modules(model):
        original = type(module)._memkern_original  # type: ignore[attr-defined]
        module.__class__ = original
        restored.append(f"{name}: {original.__name__}")
    return restored


def patched_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of ``model`` that are swapped now, with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(type(module), "_memkern_original")]


def _replacement(original: type, rule: _Rule, backend: str | None) -> type:
    known = _classes.get((original, backend))
    if known is None:
        body: dict[str, Any] = {name: getattr(rule.ours, name) for name in rule.methods}
        body |= {"_memkern_original": original, "_memkern_rule": _RULES.index(rule), "backend": backend}
        body |= {"__reduce_ex__": _reduce}
        body |= {"__module__": original.__module__, "__doc__": original.__doc__}
        known = _classes[original, backend] = type(_PREFIX + original.__name__, (original,), body)
    return known


def _difference(module: nn.Module, replacement: type, rule: _Rule) -> str | None:
    """Why the operator is no substitute for this module, or None: both on the same random inputs, without dropout."""
    if "forward" in module.__dict__:
        return "its forward is bound to the instance, and would stay"
    parameter = next(module.parameters(), None)
    device, dtype = (parameter.device, parameter.dtype) if parameter is not None else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    original, modes = type(module), {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            inputs = rule.inputs(module, draw)
            expected = _flat(module.forward(*inputs))
            module.__class__ = replacement
            actual = _flat(module.forward(*inputs))
    except Exception as error:
        return f"it does not take the inputs of its kind ({type(error).__name__}: {error})"
    finally:
        module.__class__ = original
        for child, training in modes.items():
            child.training = training
    if [value.shape for value in expected] != [value.shape for value in actual]:
        return "its results have other shapes"
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    worst = max(
        (float((a.double() - b.double()).abs().max()) for a, b in zip(expected, actual, strict=True)), default=0.0
    )
    return None if worst <= tolerance else f"its results differ from the operator's by {worst:.2g}"


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [value_ for part in value for value_ in _flat(part)]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Copy and pickle a swapped module by the class that it came from."""
    kind: Any = type(module)
    return _restore, (kind._memkern_original, kind._memkern_rule, kind.backend), module.__dict__


def _restore(original: type, rule: int, backend: str | None) -> nn.Module:
    kind: Any = _replacement(original, _RULES[rule], backend)
    made: nn.Module = kind.__new__(kind)
    return made


class _Callable(types.ModuleType):
    """The module as the function of its name: ``memkern.patch(model)``."""

    def __call__(self, model: nn.Module, backend: str | None = None) -> list[str]:
        return patch(model, backend)


sys.modules[__name__].__class__ = _Callable
