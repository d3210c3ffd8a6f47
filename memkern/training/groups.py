"""Optimiser groups: memory apart from the backbone, no decay where it would pull parameters off their meaning."""

from __future__ import annotations

from typing import Any

from torch import nn

_NORM_NAMES = ("norm", "layer_norm", "layernorm")


def param_groups(
    model: nn.Module, lr: float = 3e-5, memory_lr: float | None = None, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for any optimiser of torch.

    Args:
        model: ours (``is_memory_parameter(name)`` and ``is_initial_memory(name)`` say what is what), or any other
            module, which then has no memory.
        lr: learning rate of the backbone.
        memory_lr: of routing and memory parameters; ``lr`` when None.
        weight_decay: of matrices; biases, norms and initial memories have none.

    Returns:
        Up to four groups with ``params``, ``lr``, ``weight_decay``, ``name`` ("base", "base_no_decay", "memory",
        "memory_no_decay") and ``param_names``; every parameter that takes gradients stands in exactly one.
    """
    is_memory = getattr(model, "is_memory_parameter", lambda name: False)
    is_initial = getattr(model, "is_initial_memory", lambda name: False)
    norms = {
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if any(part in type(module).__name__.lower() for part in _NORM_NAMES)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        memory = is_memory(name)
        bare = is_initial(name) or name in norms or name.endswith("bias") or parameter.dim() < 2
        key = ("memory" if memory else "base") + ("_no_decay" if bare else "")
        group = groups.setdefault(
            key,
            {
                "params": [],
                "lr": memory_lr if memory and memory_lr is not None else lr,
                "weight_decay": 0.0 if bare else weight_decay,
                "name": key,
                "param_names": [],
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in ("base", "base_no_decay", "memory", "memory_no_decay") if key in groups]
