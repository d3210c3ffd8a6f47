"""The patch: hand-written modules become operators, visibly, reversibly, and only where they agree."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import memkern

D, S, B, K = 12, 4, 3, 3


class MemoryGatingNetwork(nn.Module):
    """A router as one writes it by hand."""

    def __init__(self, temperature: float = 0.5, pooling_method: str = "mean", limit: float = 10.0) -> None:
        super().__init__()
        self.hidden_dim, self.num_experts = D, K
        self.temperature, self.pooling_method, self.limit = temperature, pooling_method, limit
        self.routing_projection = nn.Linear(D, K)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = x.mean(1) if self.pooling_method == "mean" else x.amax(1)
        z = self.routing_projection(pooled).clamp(-self.limit, self.limit)
        probs = torch.softmax(z / self.temperature, -1)
        return probs, z, -(probs * torch.log(probs + 1e-10)).sum(-1)


class Updater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim, self.num_experts = D, K
        self.gate_networks = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(K))
        self.update_networks = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(K))

    def forward(self, states: list[torch.Tensor], written: torch.Tensor, probs: torch.Tensor) -> list[torch.Tensor]:
        new = []
        for j, state in enumerate(states):
            both = torch.cat([state, written], -1)
            a = probs[:, j, None, None] * torch.sigmoid(self.gate_networks[j](both))
            new.append(a * torch.tanh(self.update_networks[j](both)) + (1 - a) * state)
        return new


class Reader(nn.Module):
    def __init__(self, routing_mode: str = "write-based") -> None:
        super().__init__()
        self.hidden_dim, self.num_experts, self.routing_mode = D, K, routing_mode
        self.read_gating_network = MemoryGatingNetwork() if routing_mode == "read-based" else None

    def compute_read_routing(self, read_hiddens: torch.Tensor) -> torch.Tensor:
        return self.read_gating_network(read_hiddens)[0]

    def forward(self, states: list[torch.Tensor], routing_probs: Any = None, read_hiddens: Any = None) -> torch.Tensor:
        probs = routing_probs if self.routing_mode == "write-based" else self.compute_read_routing(read_hiddens)
        return (torch.stack(states, 1) * probs[:, :, None, None]).sum(1)


class Model(nn.Module):
    def __init__(self, mode: str = "write-based") -> None:
        super().__init__()
        self.router, self.updater, self.reader = MemoryGatingNetwork(), Updater(), Reader(mode)
        self.head = nn.Linear(D, 2)

    def forward(self, states: list[torch.Tensor], written: torch.Tensor) -> torch.Tensor:
        probs = self.router(written)[0]
        return self.head(self.reader(self.updater(states, written, probs), probs, written))


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, D, generator=generator) for _ in range(K)], torch.randn(B, S, D, generator=generator)


@pytest.mark.parametrize("mode", ["write-based", "read-based"])
def test_one_line_and_back(mode: str) -> None:
    model = Model(mode)
    expected = model(*inputs())
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    keys, before = list(model.state_dict()), repr(model)
    random = torch.get_rng_state()
    swapped = memkern.patch(model)
    assert torch.equal(random, torch.get_rng_state())
    assert swapped[:3] == ["router: MemoryGatingNetwork", "updater: Updater", "reader: Reader"]
    assert len(swapped) == (4 if mode == "read-based" else 3)
    for name in ("MemkernMemoryGatingNetwork", "MemkernUpdater", "MemkernReader"):
        assert name in repr(model)
    assert isinstance(model.updater, Updater)
    assert list(model.state_dict()) == keys
    assert memkern.patch(model) == []
    actual = model(*inputs())
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    for name, value in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, value)
    assert next(iter(memkern.patch.patched_modules(model)))[0] == "router"
    assert memkern.patch.unpatch(model) == swapped
    assert repr(model) == before
    assert type(model.updater) is Updater
    assert torch.equal(model(*inputs()), expected)


def test_the_backend_is_chosen_once() -> None:
    model = Model()
    memkern.patch(model, backend="reference")
    assert model.updater.backend == model.reader.backend == "reference"
    with pytest.raises(ValueError, match="unknown backend 'mlx'; the known ones are"):
        memkern.patch(model, backend="mlx")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        memkern.patch(3)


def test_copies_and_pickles_stay_swapped() -> None:
    model = Model()
    memkern.patch(model)
    expected = model(*inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.updater))):
        assert "MemkernUpdater" in repr(other)
    assert torch.equal(copy.deepcopy(model)(*inputs()), expected)
    other = Model()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(*inputs()), expected)


def test_what_disagrees_stays() -> None:
    model = Model()
    model.router = MemoryGatingNetwork(limit=0.01)
    with pytest.warns(UserWarning, match="router: MemoryGatingNetwork is left as it is: its results differ"):
        assert memkern.patch(model) == ["updater: Updater", "reader: Reader"]
    assert type(model.router) is MemoryGatingNetwork
    strange = Updater()
    strange.forward = lambda x: x  # another interface
    with pytest.warns(UserWarning, match="model: Updater is left as it is: its forward is bound to the instance"):
        assert memkern.patch(strange) == []

    class Other(Updater):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.warns(UserWarning, match="it does not take the inputs of its kind"):
        assert memkern.patch(Other()) == []

    class Shapes(Reader):
        def forward(self, *arguments: Any) -> torch.Tensor:
            return super().forward(*arguments).mean(1)

    with pytest.warns(UserWarning, match="other shapes"):
        assert memkern.patch(Shapes()) == []


def test_what_only_looks_alike_and_what_is_ours_is_not_touched() -> None:
    ours = memkern.nn.ExpertUpdater(D, 2)
    assert memkern.patch(ours) == []
    for break_it in (
        lambda m: setattr(m.router, "pooling_method", "sum"),
        lambda m: setattr(m.router, "pooling_method", "attention"),
        lambda m: setattr(m.router, "temperature", torch.ones(())),
        lambda m: setattr(m.updater, "num_experts", 5),
        lambda m: setattr(m.updater, "gate_networks", nn.ModuleList(nn.Linear(2 * D, D, bias=False) for _ in range(K))),
        lambda m: setattr(m.updater, "gate_networks", nn.ModuleList(nn.Linear(D, D) for _ in range(K))),
        lambda m: setattr(m.reader, "routing_mode", "both"),
    ):
        model = Model()
        break_it(model)
        assert len(memkern.patch(model)) == 2


def test_training_mode_is_kept() -> None:
    model = Model().train()
    model.updater.eval()
    memkern.patch(model)
    assert model.router.training
    assert not model.updater.training
