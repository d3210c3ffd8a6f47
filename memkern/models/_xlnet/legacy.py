"""The earlier file layouts: a plain XLNet checkpoint with the memory's config and weights in files beside it.

``memxlnet_config.json`` + ``memxlnet_state.pt`` (token and differentiable memory) and ``gmm_config.json`` +
``gmm_state.pt``. The weights are read without running any code that a pickle may hold.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CLOSED = -30.0
"""A gate's bias so low that the gate is shut in float32."""

_TOKEN_FIELDS = (
    "mem_token_count",
    "memory_update",
    "memory_init",
    "use_differentiable_memory",
    "num_memory_heads",
    "memory_sharpness",
    "enable_usage_tracking",
    "enable_temporal_links",
    "memory_slots",
)
_GMM_FIELDS = (
    "num_experts",
    "memory_slots",
    "routing_mode",
    "routing_temperature",
    "pooling_method",
    "init_strategies",
    "use_gmm_memory",
    "mem_token_count",
)


@dataclass
class Earlier:
    """A checkpoint in an earlier layout."""

    memory_type: str
    fields: dict[str, Any]
    """Memory fields of its config, as ours are called."""
    weights: dict[str, Tensor]
    """By the names of our parameters, and those that have no counterpart by their own."""

    def fill(self, model: Any) -> list[str]:
        """Copy the weights into ``model``; the result lists what had to be initialised and what has no place."""
        parameters = dict(model.memory_named_parameters())
        notes, filled = [], set()
        with torch.no_grad():
            for name, weight in self.weights.items():
                parameter = parameters.get(name)
                if parameter is None:
                    notes.append(f"no counterpart: {name}")
                    continue
                if parameter.shape != weight.shape:
                    raise ValueError(
                        f"{name}: the checkpoint holds {tuple(weight.shape)}, its config says {tuple(parameter.shape)}"
                    )
                parameter.copy_(weight)
                filled.add(name)
            if self.memory_type == "differentiable":
                filled |= _address_by_content(model.memory_controller)
        return [f"initialised: {name}" for name in parameters if name not in filled] + notes


def find(path: Any) -> Earlier | None:
    """What lies at ``path`` in an earlier layout, or None.

    Raises:
        ValueError: a file of it is damaged, or says another type than its name.
    """
    folder = Path(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
    if folder is None or not folder.is_dir():
        return None
    if (folder / "gmm_config.json").is_file():
        return _gmm(folder)
    if (folder / "memxlnet_config.json").is_file():
        return _token(folder)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return fields


def _weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds more than weights: {error}") from error
    return state


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """Nested state dicts by dotted name."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in _flat(value).items()}
    return flat


def _gmm(folder: Path) -> Earlier:
    config = _read(folder / "gmm_config.json")
    kind = config.get("memory_type", "gmm")
    if kind != "gmm":
        raise ValueError(f"{folder / 'gmm_config.json'}: expected memory type 'gmm', got {kind!r}")
    fields = {name: config[name] for name in _GMM_FIELDS if name in config}
    if not fields.get("use_gmm_memory", True):
        return Earlier("standard", {}, {})
    fields.pop("mem_token_count", None)  # the earlier one could differ from the slots, and then never ran
    said = fields.get("num_experts", 4)
    fields["max_experts"] = max(8, said)
    weights = _flat(_weights(folder / "gmm_state.pt"))
    held = sum(name.startswith("memory_mixture._expert_params.") for name in weights)
    if weights and held != said:
        raise ValueError(f"{folder / 'gmm_state.pt'}: expected {said} experts, as gmm_config.json says, got {held}")
    return Earlier("gmm", fields, weights)


def _token(folder: Path) -> Earlier:
    config = _read(folder / "memxlnet_config.json")
    fields = {name: config[name] for name in _TOKEN_FIELDS if name in config}
    # Any unknown update was a plain replacement, any unknown initial memory zeros.
    if fields.get("memory_update", "gated") not in ("gated", "none"):
        fields["memory_update"] = "replace"
    if fields.get("memory_init", "learned") != "learned":
        fields["memory_init"] = "zeros"
    state = _weights(folder / "memxlnet_state.pt")
    if config.get("version") == 1:
        if "init_memory" in state:
            state["learned_memory"] = state.pop("init_memory")
        if "gate" in state:
            state["memory_gate"] = state["memory_update_net"] = state.pop("gate")
    weights = _flat(state)
    # The earlier bank was a buffer that documents shared; what it held belongs to none of them.
    buffers = {f"memory_controller.memory.{name}" for name in ("memory", "usage", "temporal_links")}
    weights = {name: value for name, value in weights.items() if name not in buffers}
    if fields.get("use_differentiable_memory"):
        return Earlier("differentiable", fields, weights)
    return Earlier("token" if fields.get("mem_token_count") else "standard", fields, weights)


def _address_by_content(controller: Any) -> set[str]:
    """Shut what the earlier controller did not have: allocation and free gates; reads follow content alone."""
    done = set()
    for name in ("allocation_gate", "free_gates"):
        layer = getattr(controller, name)
        if layer is not None:
            layer.weight.zero_()
            layer.bias.fill_(_CLOSED)
            done |= {f"memory_controller.{name}.weight", f"memory_controller.{name}.bias"}
    if controller.read_modes is not None:
        heads = controller.num_heads
        controller.read_modes.weight.zero_()
        modes = controller.read_modes.bias.view(heads, 1 + 2 * heads)
        modes.fill_(_CLOSED)
        modes[:, heads] = -_CLOSED
        done |= {"memory_controller.read_modes.weight", "memory_controller.read_modes.bias"}
    return done
