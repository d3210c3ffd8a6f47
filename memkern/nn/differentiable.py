"""The earlier stateful interface of the differentiable memory, on batched operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memkern.nn import _checks
from memkern.ops import memory as ops


class DifferentiableMemory(nn.Module):
    """A bank that is addressed by content, read by weights, and written with erase and add.

    Every row of a batch has a bank of its own. The module holds the current one, without a graph, so that a second
    training step never reaches into the first; ``memory``, ``usage`` and ``temporal_links`` show it, without batch axis
    while there is only one row. For gradients through a write, read what :meth:`write` returns:
    ``memory.read(w, bank=memory.write(w, v))``.

    Args:
        num_slots: N.
        slot_dim: W.
        num_heads: H.
        sharpness: > 0, the inverse temperature of :meth:`content_addressing` where no strengths are given.
        enable_usage_tracking: keep the usage; without it :meth:`get_usage_weights` is uniform.
        enable_temporal_links: keep the order of writing.
        backend: see :mod:`memkern.backends`.

    Raises:
        ValueError: an argument out of range, named.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        num_heads: int = 1,
        sharpness: float = 1.0,
        enable_usage_tracking: bool = True,
        enable_temporal_links: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_slots = _checks.positive("num_slots", num_slots)
        self.slot_dim = _checks.positive("slot_dim", slot_dim)
        self.num_heads = _checks.positive("num_heads", num_heads)
        if isinstance(sharpness, bool) or not isinstance(sharpness, int | float) or not sharpness > 0:
            raise ValueError(f"sharpness must be > 0, got {sharpness!r}")
        self.sharpness = float(sharpness)
        self.enable_usage_tracking = enable_usage_tracking
        self.enable_temporal_links = enable_temporal_links
        self.backend = backend
        self._bank: ops.MemoryState | None = None

    def _current(self, batch: int, like: Tensor) -> ops.MemoryState:
        bank = self._bank
        if bank is None:
            content = like.new_zeros(self.num_slots, self.slot_dim)
            sizes = (batch, self.num_slots, self.slot_dim, self.num_heads, self.num_heads)
            return ops.initial_memory_state(*sizes, device=like.device, memory=content)
        if bank.memory.shape[0] != batch:
            raise ValueError(f"the memory holds {bank.memory.shape[0]} rows, got {batch}; reset() starts a new batch")
        return ops.MemoryState(*(field.to(like.device) for field in bank))

    def _shown(self, field: str, *shape: int) -> Tensor:
        if self._bank is None:
            return torch.zeros(shape)
        value = getattr(self._bank, field)
        if field == "links":
            value = value.mean(1).transpose(1, 2)
        return value[0] if value.shape[0] == 1 else value

    @property
    def memory(self) -> Tensor:
        """(N, W), or (B, N, W) for several rows."""
        return self._shown("memory", self.num_slots, self.slot_dim)

    @property
    def usage(self) -> Tensor:
        """(N,) or (B, N), in [0, 1]."""
        return self._shown("usage", self.num_slots)

    @property
    def temporal_links(self) -> Tensor:
        """(N, N) or (B, N, N) as [from, to]: how much the second slot was written right after the first."""
        return self._shown("links", self.num_slots, self.num_slots)

    def content_addressing(self, key: Tensor, beta: Tensor | None = None) -> Tensor:
        """(B, H, W) keys and (B, H) or (B, H, 1) strengths -> (B, H, N): softmax of beta times the cosine."""
        self._check("key", key, self.slot_dim)
        bank = self._current(key.shape[0], key)
        strengths = key.new_full(key.shape[:2], self.sharpness) if beta is None else beta.reshape(key.shape[:2])
        return ops.content_weights(bank.memory.to(key.dtype), key, strengths, backend=self.backend)

    def read(self, weights: Tensor, bank: Tensor | None = None) -> Tensor:
        """(B, H, N) weights -> (B, H, W), from the current memory or from ``bank`` (B, N, W)."""
        self._check("weights", weights, self.num_slots)
        if bank is None:
            bank = self._current(weights.shape[0], weights).memory.to(weights.dtype)
        return ops.read_memory(bank, weights, backend=self.backend)

    def write(self, weights: Tensor, value: Tensor, erase: Tensor | None = None) -> Tensor:
        """Erase and add: M prod_h (1 - w_h e_h) + sum_h w_h v_h.

        Args:
            weights: (B, H, N), each head's sum at most 1.
            value: (B, H, W).
            erase: (B, H, W) in [0, 1]; nothing is erased by default.

        Returns:
            (B, N, W): the new memory with its graph; the module keeps it without.
        """
        self._check("weights", weights, self.num_slots)
        self._check("value", value, self.slot_dim)
        bank = self._current(weights.shape[0], weights)
        erase = torch.zeros_like(value) if erase is None else erase
        memory = ops.write_memory(bank.memory.to(weights.dtype), weights, erase, value, backend=self.backend)
        written = weights.detach()
        links, precedence, usage = bank.links, bank.precedence, bank.usage
        if self.enable_temporal_links:
            links, precedence = ops.update_links(links, precedence, written, backend=self.backend)
        if self.enable_usage_tracking:
            nothing_read, nothing_freed = torch.zeros_like(written), written.new_zeros(written.shape[:2])
            usage = ops.update_usage(usage, written, nothing_read, nothing_freed, backend=self.backend)
        kept = (memory, usage, links, precedence, bank.read_weights, written)
        self._bank = ops.MemoryState(*(field.detach() for field in kept))
        return memory

    def get_usage_weights(self) -> Tensor:
        """(N,) or (B, N): where new content goes, most on the least used slots; uniform without tracking."""
        usage = self.usage
        if not self.enable_usage_tracking:
            return torch.full_like(usage, 1.0 / self.num_slots)
        weights = ops.allocation_weights(usage if usage.dim() == 2 else usage[None], backend=self.backend)
        return weights if usage.dim() == 2 else weights[0]

    def reset(self) -> None:
        """Empty the memory, for a batch of any size."""
        self._bank = None

    def _check(self, name: str, value: Tensor, width: int) -> None:
        if value.dim() != 3 or tuple(value.shape[1:]) != (self.num_heads, width):
            raise ValueError(f"{name}: expected shape (B, {self.num_heads}, {width}), got {tuple(value.shape)}")

    def extra_repr(self) -> str:
        return (
            f"num_slots={self.num_slots}, slot_dim={self.slot_dim}, num_heads={self.num_heads}, "
            f"sharpness={self.sharpness}, enable_usage_tracking={self.enable_usage_tracking}, "
            f"enable_temporal_links={self.enable_temporal_links}"
        )
