"""Optimiser groups: every parameter once, memory apart, no decay where it does not belong."""

from __future__ import annotations

import torch
from torch import nn

from memkern.training import param_groups


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
        self.router = nn.Linear(3, 2)
        self.initial = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def is_memory_parameter(self, name: str) -> bool:
        return not name.startswith("base")

    def is_initial_memory(self, name: str) -> bool:
        return name == "initial"


def test_groups() -> None:
    model = Tiny()
    groups = {group["name"]: group for group in param_groups(model, lr=1.0, memory_lr=2.0, weight_decay=0.5)}
    assert {name: group["param_names"] for name, group in groups.items()} == {
        "base": ["base.0.weight", "base.2.weight"],
        "base_no_decay": ["base.0.bias", "base.1.weight", "base.1.bias"],
        "memory": ["router.weight"],
        "memory_no_decay": ["initial", "router.bias"],
    }
    assert [group["lr"] for group in groups.values()] == [1.0, 1.0, 2.0, 2.0]
    assert [group["weight_decay"] for group in groups.values()] == [0.5, 0.0, 0.5, 0.0]
    torch.optim.AdamW(list(groups.values()))


def test_a_plain_module_has_no_memory() -> None:
    assert [group["name"] for group in param_groups(nn.Linear(2, 2))] == ["base", "base_no_decay"]
    assert {group["lr"] for group in param_groups(Tiny(), lr=1e-3)} == {1e-3}
