"""Gated updates of the experts by what a segment wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from memkern.nn import _checks
from memkern.nn._init import KeepLinear
from memkern.nn._stacked import pack, stacked
from memkern.ops.expert_update import update_experts


class ExpertUpdater(nn.Module):
    """M_j' = a u + (1 - a) M_j with g = sigmoid(Wg_j [M_j; h]), u = tanh(Wu_j [M_j; h]) and a = p_j g.

    p_j = 0 keeps an expert bit for bit. Gates start rather shut (bias -1). All experts are updated by one operator over
    the stacked weights; the layers themselves keep their own names in a checkpoint.

    Args:
        hidden_dim: D.
        num_experts: k in [2, ``max_experts``].
        max_experts: the largest k accepted.
        backend: see :mod:`memkern.backends`.

    Raises:
        ValueError: a count out of range.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        max_experts: int = _checks.MAX_EXPERTS,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = _checks.positive("hidden_dim", hidden_dim)
        self.num_experts = _checks.num_experts(num_experts, max_experts)
        self.backend = backend
        self.gate_networks = nn.ModuleList(KeepLinear(2 * hidden_dim, hidden_dim) for _ in range(num_experts))
        self.update_networks = nn.ModuleList(nn.Linear(2 * hidden_dim, hidden_dim) for _ in range(num_experts))
        self.register_load_state_dict_post_hook(_pack_again)
        self.pack()

    def pack(self) -> None:
        """Lay the experts' weights side by side, so that stacking them copies nothing; values stay as they are."""
        for networks in (self.gate_networks, self.update_networks):
            weights, biases = _parameters(networks)
            pack(weights)
            pack(biases)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.pack()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def update(
        self, states: Tensor, write_hiddens: Tensor, routing_probs: Tensor, row_mask: Tensor | None = None
    ) -> Tensor:
        """The update on stacked states.

        Args:
            states: (B, k, S, D).
            write_hiddens: (B, S, D).
            routing_probs: (B, k).
            row_mask: (B,) bool; False keeps a row's states bit for bit.

        Returns:
            (B, k, S, D).
        """
        parameters = (*_parameters(self.gate_networks), *_parameters(self.update_networks))
        return update_experts(
            states,
            write_hiddens,
            routing_probs,
            *(stacked(parts) for parts in parameters),
            row_mask=row_mask,
            backend=self.backend,
        )

    def forward(self, expert_states: list[Tensor], write_hiddens: Tensor, routing_probs: Tensor) -> list[Tensor]:
        """k new states from k states (B, S, D), what was written (B, S, D) and the routing (B, k).

        Raises:
            ValueError: another number of experts or another shape. Values outside [0, 1] are refused under
                ``MEMKERN_CHECK=1``.
        """
        _checks.expert_list(expert_states, self.num_experts, "ExpertUpdater")
        _checks.rows("write_hiddens", write_hiddens, self.hidden_dim)
        _checks.routing_probs(routing_probs, write_hiddens.shape[0], self.num_experts)
        _checks.same_shape(expert_states, tuple(write_hiddens.shape))
        return list(self.update(torch.stack(list(expert_states), 1), write_hiddens, routing_probs).unbind(1))

    def compute_expert_gates(
        self, expert_state: Tensor, write_hidden: Tensor, expert_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The gate in [0, 1] and the candidate in [-1, 1] of one expert, (B, S, D) each, for inspection.

        Raises:
            IndexError: no such expert.
        """
        _checks.expert_index(expert_idx, self.num_experts)
        both = torch.cat([expert_state, write_hidden], -1)
        return torch.sigmoid(self.gate_networks[expert_idx](both)), torch.tanh(self.update_networks[expert_idx](both))

    def apply_routing_modulation(self, gates: Tensor, routing_probs: Tensor) -> Tensor:
        """a = p g, for inspection: the share of the candidate that enters an expert."""
        return routing_probs * gates

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_experts={self.num_experts}"


def _pack_again(module: nn.Module, incompatible: Any) -> None:
    """``load_state_dict(assign=True)`` has put each weight elsewhere."""
    cast("ExpertUpdater", module).pack()


def _parameters(networks: nn.ModuleList) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The layers' weights and biases, in order."""
    layers = cast("list[nn.Linear]", list(networks))
    return [cast("nn.Parameter", layer.weight) for layer in layers], [layer.bias for layer in layers]
