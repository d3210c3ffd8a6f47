"""The weighted read over all experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memkern.nn import _checks
from memkern.nn.gating import MemoryGatingNetwork
from memkern.ops import _checks as _op_checks
from memkern.ops.expert_update import aggregate_experts

ROUTING_MODES = ("write-based", "read-based")


class AggregatedMemoryReader(nn.Module):
    """A = sum_j p_j M_j, with the probabilities of the write ("write-based") or of a router of its own ("read-based").

    Args:
        hidden_dim: D.
        num_experts: k in [2, ``max_experts``].
        routing_mode: "write-based" or "read-based".
        temperature, pooling_method: of the read router; see :class:`MemoryGatingNetwork`.
        max_experts: the largest k accepted.
        backend: see :mod:`memkern.backends`.

    Raises:
        ValueError: a count out of range or an unknown mode, named.
    """

    read_gating_network: MemoryGatingNetwork | None

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        routing_mode: str = "write-based",
        temperature: float = 1.0,
        pooling_method: str = "mean",
        max_experts: int = _checks.MAX_EXPERTS,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = _checks.positive("hidden_dim", hidden_dim)
        self.num_experts = _checks.num_experts(num_experts, max_experts)
        if routing_mode not in ROUTING_MODES:
            raise ValueError(f"routing_mode must be 'write-based' or 'read-based', got {routing_mode!r}")
        self.routing_mode = routing_mode
        self.backend = backend
        self.read_gating_network = None
        if routing_mode == "read-based":
            self.read_gating_network = MemoryGatingNetwork(
                hidden_dim, num_experts, temperature, pooling_method, max_experts, backend=backend
            )

    def aggregate(self, states: Tensor, routing_probs: Tensor) -> Tensor:
        """Stacked states (B, k, S, D) and probabilities (B, k) -> (B, S, D)."""
        return aggregate_experts(states, routing_probs, backend=self.backend)

    def forward(
        self, expert_states: list[Tensor], routing_probs: Tensor | None = None, read_hiddens: Tensor | None = None
    ) -> Tensor:
        """k states (B, S, D), and the routing (B, k) or what to route on (B, S', D) -> (B, S, D).

        Raises:
            ValueError: the input that this mode needs is missing, or a shape is wrong.
        """
        _checks.expert_list(expert_states, self.num_experts, f"routing_mode={self.routing_mode!r}")
        if self.routing_mode == "write-based":
            if routing_probs is None:
                raise ValueError("routing_probs required for write-based routing mode")
            probs = routing_probs
        else:
            if read_hiddens is None:
                raise ValueError("read_hiddens required for read-based routing mode")
            _checks.rows("read_hiddens", read_hiddens, self.hidden_dim)
            probs = self.compute_read_routing(read_hiddens)
        first = expert_states[0]
        _checks.same_shape(expert_states, (*first.shape[:2], self.hidden_dim))
        _checks.routing_probs(probs, first.shape[0], self.num_experts)
        return self.aggregate(torch.stack(list(expert_states), 1), probs)

    def compute_read_routing(self, read_hiddens: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """(B, S', D) -> (B, k): the read router's probabilities.

        Raises:
            RuntimeError: the mode is not "read-based".
        """
        if self.read_gating_network is None:
            raise RuntimeError(
                f"compute_read_routing() only available in read-based mode, current mode is {self.routing_mode!r}"
            )
        probs: Tensor = self.read_gating_network(read_hiddens, slot_mask)[0]
        return probs

    def replace_read_embeddings(
        self, sequence_output: Tensor, aggregated_memory: Tensor, read_positions: Tensor
    ) -> Tensor:
        """A copy of (B, T, D) with ``aggregated_memory`` (B, S, D) at ``read_positions`` (B, S) or (B,) int64.

        Of equal positions in a row the last one holds. Positions outside [0, T) are refused under ``MEMKERN_CHECK=1``;
        without it they are an error of the device.

        Raises:
            ValueError: batch, width or number of positions do not fit.
        """
        batch, length, width = sequence_output.shape
        positions = read_positions.unsqueeze(1) if read_positions.dim() == 1 else read_positions
        if positions.dim() != 2:
            raise ValueError(
                f"read_positions must be 1D (batch_size,) or 2D (batch_size, num_read_tokens), "
                f"got {read_positions.dim()}D tensor"
            )
        if aggregated_memory.shape[0] != batch:
            raise ValueError(
                f"Batch size mismatch: sequence_output {batch}, aggregated_memory {aggregated_memory.shape[0]}"
            )
        if aggregated_memory.shape[2] != width:
            raise ValueError(
                f"Hidden dimension mismatch: sequence_output {width}, aggregated_memory {aggregated_memory.shape[2]}"
            )
        if tuple(positions.shape) != tuple(aggregated_memory.shape[:2]):
            raise ValueError(
                f"Number of memory slots ({aggregated_memory.shape[1]}) must match number of read positions "
                f"({positions.shape[1]}), batch {batch} and {positions.shape[0]}"
            )
        if _op_checks.values_enabled() or not positions.is_cuda:
            bad = (positions < 0) | (positions >= length)
            if not torch.compiler.is_compiling() and bool(bad.any()):
                raise ValueError(
                    f"read_positions must be in [0, {length}), got {int(positions.min())} to {int(positions.max())}"
                )
        # hit[b, t, i]: slot i goes to position t; the last of several wins, so that the result is one gather.
        hit = positions.unsqueeze(1) == torch.arange(length, device=positions.device)[None, :, None]
        order = torch.arange(1, positions.shape[1] + 1, device=positions.device)
        last = (hit * order).amax(2)
        chosen = aggregated_memory.to(sequence_output.dtype).gather(
            1, (last - 1).clamp(min=0)[..., None].expand(-1, -1, width)
        )
        return torch.where((last > 0)[..., None], chosen, sequence_output)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, routing_mode={self.routing_mode!r}"
