"""Names the argument that is on another device, before torch fails in the middle of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def check_devices(backbone: Any, name: str, given: Tensor, **others: Tensor | None) -> None:
    """Check that a batch is in one place, and where the backbone expects it.

    Args:
        backbone: the transformer that gets the batch. Where something else places its inputs or its weights
            (accelerate's ``device_map`` and hooks, FSDP2 with weights kept on the CPU), its device is not asked.
        name, given: the argument that decides, such as ``input_ids``.
        others: the arguments that go with it, by name.

    Raises:
        ValueError: one of them is elsewhere; the message names it, what was expected and what came.
    """
    for other, tensor in others.items():
        if tensor is not None and tensor.device != given.device:
            raise ValueError(f"{other}: expected device {given.device}, as {name} has, got {tensor.device}")
    if hasattr(backbone, "_hf_hook") or getattr(backbone, "hf_device_map", None):
        return
    embedding: nn.Module | None = backbone.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or isinstance(weight, DTensor) or hasattr(embedding, "_hf_hook"):
        return
    if weight.device not in (given.device, torch.device("meta")):
        raise ValueError(f"{name}: expected device {weight.device}, as the model's weights have, got {given.device}")
