"""The learned initial memory of k experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from memkern.nn import _checks
from memkern.nn._init import ExpertList

INIT_STRATEGIES = ("learned", "zeros", "uniform", "orthogonal")


class GatedMemoryMixture(nn.Module):
    """k memory banks (S, D): the learned values from which every document starts.

    The parameters are never overwritten. ``set_expert_state`` stores a copy beside them, which ``get_expert_state``
    then gives, and ``reset_experts`` drops it, so that a reset returns to the learned values.

    Args:
        num_experts: k in [2, ``max_experts``].
        memory_slots: S >= 1.
        hidden_dim: D >= 1.
        init_strategies: how the parameters are drawn, one name for all experts or a list of k: "learned" (normal,
            0.02), "zeros", "uniform" (in [0, 0.1)) or "orthogonal" (orthonormal rows where S <= D).
        max_experts: the largest k accepted.

    Raises:
        ValueError: a count out of range, an unknown strategy, or a list of another length than k.
    """

    def __init__(
        self,
        num_experts: int,
        memory_slots: int,
        hidden_dim: int,
        init_strategies: str | Sequence[str] = "learned",
        max_experts: int = _checks.MAX_EXPERTS,
    ) -> None:
        super().__init__()
        self.num_experts = _checks.num_experts(num_experts, max_experts)
        self.memory_slots = _checks.positive("memory_slots", memory_slots)
        self.hidden_dim = _checks.positive("hidden_dim", hidden_dim)
        self.init_strategies = check_strategies(init_strategies, num_experts)
        self._expert_params = ExpertList(self.init_strategies, memory_slots, hidden_dim)
        self._set_states: dict[int, Tensor] = {}

    def get_expert_state(self, expert_idx: int) -> Tensor:
        """(S, D): the state that was set, else the learned parameter.

        Raises:
            IndexError: no such expert.
        """
        _checks.expert_index(expert_idx, self.num_experts)
        return self._set_states.get(expert_idx, self._expert_params[expert_idx])

    def set_expert_state(self, expert_idx: int, state: Tensor) -> None:
        """Keep a copy of ``state`` (S, D) as the current state of one expert; the learned value stays.

        Raises:
            IndexError: no such expert.
            ValueError: another shape.
        """
        _checks.expert_index(expert_idx, self.num_experts)
        expected = (self.memory_slots, self.hidden_dim)
        if tuple(state.shape) != expected:
            raise ValueError(f"Expert state must have shape {expected}, got {tuple(state.shape)}")
        like = self._expert_params[expert_idx]
        self._set_states[expert_idx] = state.detach().to(like.device, like.dtype, copy=True)

    def reset_experts(self) -> None:
        """Return every expert to its learned initial memory; nothing is drawn anew."""
        self._set_states.clear()

    def get_all_experts(self) -> list[Tensor]:
        """k tensors (S, D), as :meth:`get_expert_state` gives them."""
        return [self.get_expert_state(index) for index in range(self.num_experts)]

    def forward(self, expert_states: list[Tensor] | None = None) -> list[Tensor]:
        """The current states, or ``expert_states`` after a check: k tensors, (S, D) or (B, S, D).

        Raises:
            ValueError: another number of tensors, or another shape.
        """
        if expert_states is None:
            return self.get_all_experts()
        _checks.expert_list(expert_states, self.num_experts, "GatedMemoryMixture")
        expected = (self.memory_slots, self.hidden_dim)
        for index, state in enumerate(expert_states):
            if state.dim() not in (2, 3):
                raise ValueError(
                    f"Expert {index} state must be 2D (memory_slots, hidden_dim) "
                    f"or 3D (batch_size, memory_slots, hidden_dim), got {state.dim()}D tensor"
                )
            if tuple(state.shape[-2:]) != expected:
                raise ValueError(
                    f"Expert {index} state has shape mismatch. Expected {expected}, got {tuple(state.shape[-2:])}. "
                    "All experts must maintain identical shape"
                )
        return expert_states

    def extra_repr(self) -> str:
        strategies = ", ".join(self.init_strategies)
        return (
            f"num_experts={self.num_experts}, memory_slots={self.memory_slots}, hidden_dim={self.hidden_dim}, "
            f"init_strategies=[{strategies}]"
        )


def check_strategies(given: str | Sequence[str], count: int) -> list[str]:
    """``given`` as a list of ``count`` known strategies; a ValueError says what is wrong otherwise."""
    names = [given] * count if isinstance(given, str) else list(given)
    if len(names) != count:
        raise ValueError(f"init_strategies must have length {count}, got {len(names)}")
    for index, name in enumerate(names):
        if name not in INIT_STRATEGIES:
            raise ValueError(
                f"Invalid init_strategy {name!r} for expert {index}: one of {', '.join(map(repr, INIT_STRATEGIES))}"
            )
    return names
