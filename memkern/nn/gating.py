"""The router: which experts a segment writes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkern.nn import _checks
from memkern.ops.routing import Routing, load_balance_loss, route_experts, routing_entropy

POOLINGS = ("mean", "max", "attention")


class MemoryGatingNetwork(nn.Module):
    """Pool the write slots, project them to k logits, softmax with a temperature.

    Args:
        hidden_dim: D.
        num_experts: k in [2, ``max_experts``].
        temperature: > 0; high flattens, low sharpens.
        pooling_method: "mean", "max", or "attention" with a learned ``pool_query`` (D,).
        max_experts: the largest k accepted.
        backend: see :mod:`memkern.backends`.

    Raises:
        ValueError: an argument out of range or an unknown pooling, named.

    Source: Shazeer et al., "Outrageously Large Neural Networks" (2017), with the softmax dense; see
    :func:`memkern.ops.route_experts`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        temperature: float = 1.0,
        pooling_method: str = "mean",
        max_experts: int = _checks.MAX_EXPERTS,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = _checks.positive("hidden_dim", hidden_dim)
        self.num_experts = _checks.num_experts(num_experts, max_experts)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise ValueError(f"Temperature must be > 0, got {temperature!r}")
        if pooling_method not in POOLINGS:
            raise ValueError(f"pooling_method must be one of 'mean', 'max', 'attention', got {pooling_method!r}")
        self.temperature = temperature
        self.pooling_method = pooling_method
        self.backend = backend
        self.routing_projection = nn.Linear(hidden_dim, num_experts)
        if pooling_method == "attention":
            self.pool_query = nn.Parameter(torch.empty(hidden_dim))
            self.draw(nn.init)

    def draw(self, init: Any) -> None:
        """Draw ``pool_query``, so that the first scores are of the size of one; the projection is a plain Linear."""
        if self.pooling_method == "attention":
            init.normal_(self.pool_query, mean=0.0, std=1.0)

    def route(self, hiddens: Tensor, slot_mask: Tensor | None = None, row_mask: Tensor | None = None) -> Routing:
        """Probabilities, logits, entropy and load-balance loss in one operator call.

        Args:
            hiddens: (B, S, D) float.
            slot_mask: (B, S) bool, True for slots that take part in the pooling.
            row_mask: (B,) bool, True for rows that count in the loss.

        Raises:
            ValueError: another rank or width.
        """
        if hiddens.dim() != 3:
            raise ValueError(f"hiddens must be 3D (batch_size, memory_slots, hidden_dim), got {hiddens.dim()}D tensor")
        if hiddens.shape[2] != self.hidden_dim:
            raise ValueError(f"Expected hidden_dim={self.hidden_dim}, got {hiddens.shape[2]}")
        return route_experts(
            hiddens,
            self.routing_projection.weight,
            self.routing_projection.bias,
            temperature=self.temperature,
            pooling=self.pooling_method,
            pool_query=self.pool_query if self.pooling_method == "attention" else None,
            slot_mask=slot_mask,
            row_mask=row_mask,
            backend=self.backend,
        )

    def forward(self, hiddens: Tensor, slot_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> probs (B, k), clamped logits (B, k) before the temperature, entropy (B,)."""
        routing = self.route(hiddens, slot_mask)
        return routing.probs, routing.logits, routing.entropy

    def compute_routing_entropy(self, routing_probs: Tensor) -> Tensor:
        """(B, k) -> (B,): -sum p ln(p + 1e-10)."""
        return routing_entropy(routing_probs, backend=self.backend)

    def compute_load_balance_loss(self, routing_probs: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """(B, k) -> (): k sum_i f_i P_i, 1 when the experts are used evenly."""
        return load_balance_loss(routing_probs, row_mask=row_mask, backend=self.backend)

    def get_routing_weights(self) -> Tensor:
        """(k, D): the projection's weight, without graph."""
        return self.routing_projection.weight.data

    def get_routing_distribution(self, routing_probs: Tensor) -> dict[str, Any]:
        """mean_probs, max_probs, min_probs (k,), entropy_mean and entropy_std (unbiased; 0 for a single row)."""
        entropy = self.compute_routing_entropy(routing_probs)
        spread = entropy.std() if entropy.numel() > 1 else torch.zeros_like(entropy.sum())
        return {
            "mean_probs": routing_probs.mean(0),
            "max_probs": routing_probs.amax(0),
            "min_probs": routing_probs.amin(0),
            "entropy_mean": entropy.mean(),
            "entropy_std": spread,
        }

    def extra_repr(self) -> str:
        return (
            f"hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, temperature={self.temperature}, "
            f"pooling_method={self.pooling_method!r}"
        )
