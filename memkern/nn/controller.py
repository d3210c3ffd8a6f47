"""The controller of the differentiable memory: from a hidden state to one step of it, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memkern.nn import _checks
from memkern.nn._init import XavierLinear
from memkern.nn.state import copy_state
from memkern.ops.memory import MemoryInterface, MemoryState, initial_memory_state, memory_step


class MemoryController(nn.Module):
    """One step of the memory of Graves et al. (2016) per call, with H heads that read and H that write.

    The state goes in and comes out; nothing is shared between rows. What :meth:`set_memory_state` stores is what calls
    without a state start from until :meth:`reset_memory`, and no call changes it.

    Args:
        input_dim: width of ``x``.
        memory_slots: N.
        memory_dim: W, width of a slot.
        num_heads: H.
        use_temporal_links: follow the order of writing with directional reads (``read_modes``). Without it reads are by
            content alone.
        use_usage_tracking: free slots after reading (``free_gates``) and report the usage. Without it a slot that was
            written stays used. Allocation looks at the usage either way: without it every slot of an empty memory would
            receive the same vector for ever.
        sharpness: > 0; the read weights w become w^s / sum w^s. Higher is never less focused.
        use_output: create ``output_proj``; without it ``out`` is None.
        backend: see :mod:`memkern.backends`.

    Raises:
        ValueError: an argument out of range, named.
    """

    def __init__(
        self,
        input_dim: int,
        memory_slots: int,
        memory_dim: int,
        num_heads: int = 1,
        use_temporal_links: bool = False,
        use_usage_tracking: bool = True,
        sharpness: float = 1.0,
        *,
        use_output: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = _checks.positive("input_dim", input_dim)
        self.memory_slots = _checks.positive("memory_slots", memory_slots)
        self.memory_dim = _checks.positive("memory_dim", memory_dim)
        self.num_heads = _checks.positive("num_heads", num_heads)
        if isinstance(sharpness, bool) or not isinstance(sharpness, int | float) or not sharpness > 0:
            raise ValueError(f"sharpness must be > 0, got {sharpness!r}")
        self.use_temporal_links = use_temporal_links
        self.use_usage_tracking = use_usage_tracking
        self.sharpness = float(sharpness)
        self.backend = backend
        width, heads = num_heads * memory_dim, num_heads
        self.read_keys = XavierLinear(input_dim, width)
        self.read_strengths = XavierLinear(input_dim, heads)
        self.write_keys = XavierLinear(input_dim, width)
        self.write_strengths = XavierLinear(input_dim, heads)
        self.write_vectors = XavierLinear(input_dim, width)
        self.erase_vectors = XavierLinear(input_dim, width)
        self.write_gate = XavierLinear(input_dim, heads)
        self.allocation_gate = XavierLinear(input_dim, heads)
        self.free_gates = XavierLinear(input_dim, heads) if use_usage_tracking else None
        self.read_modes = XavierLinear(input_dim, heads * (1 + 2 * heads)) if use_temporal_links else None
        self.output_proj = XavierLinear(width, input_dim) if use_output else None
        self._set_state: MemoryState | Tensor | None = None

    def interface(self, x: Tensor) -> MemoryInterface:
        """(B, input_dim) -> what :func:`memkern.ops.memory_step` reads: keys, strengths, gates and modes."""
        batch, heads = x.shape[0], self.num_heads

        def vectors(layer: nn.Linear) -> Tensor:
            return layer(x).view(batch, heads, self.memory_dim)

        def strengths(layer: nn.Linear) -> Tensor:
            return 1 + functional.softplus(layer(x))

        if self.read_modes is None:
            modes = functional.pad(x.new_ones(batch, heads, 1), (heads, heads))
        else:
            modes = torch.softmax(self.read_modes(x).view(batch, heads, 1 + 2 * heads), -1)
        free = x.new_zeros(batch, heads) if self.free_gates is None else torch.sigmoid(self.free_gates(x))
        return MemoryInterface(
            read_keys=vectors(self.read_keys),
            read_strengths=strengths(self.read_strengths),
            read_modes=modes,
            write_keys=vectors(self.write_keys),
            write_strengths=strengths(self.write_strengths),
            write_vectors=vectors(self.write_vectors),
            erase_vectors=torch.sigmoid(vectors(self.erase_vectors)),
            free_gates=free,
            allocation_gates=torch.sigmoid(self.allocation_gate(x)),
            write_gates=torch.sigmoid(self.write_gate(x)),
        )

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> MemoryState:
        """The state that was set, for ``batch`` rows, else an empty memory.

        Raises:
            ValueError: the state that was set has another batch.
        """
        weight = self.write_gate.weight
        device = weight.device if device is None else device
        if isinstance(self._set_state, MemoryState):
            if self._set_state.memory.shape[0] != batch:
                raise ValueError(
                    f"memory state that was set: expected batch {batch}, got {self._set_state.memory.shape[0]}"
                )
            return MemoryState(*(field.to(device) for field in self._set_state))
        memory = self._set_state
        if memory is None and weight.dtype == torch.float64:
            memory = weight.new_zeros(self.memory_slots, self.memory_dim)
        if memory is not None:
            memory = memory.to(device)
            if memory.dim() == 3 and memory.shape[0] != batch:
                raise ValueError(f"memory state that was set: expected batch {batch}, got {memory.shape[0]}")
        sizes = (batch, self.memory_slots, self.memory_dim, self.num_heads, self.num_heads)
        return initial_memory_state(*sizes, device=device, memory=memory)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, step_mask: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Write, then read.

        Args:
            x: (B, input_dim) float.
            state: what the call before returned as ``info["state"]``; None starts from what was set, else empty.
            step_mask: (B,) bool; a False row reads zeros and keeps its state bit for bit.

        Returns:
            out (B, input_dim), and info: read_weights, write_weights (B, H, N), read_vectors, write_vectors (B, H, W),
            memory_state (B, N, W), usage (B, N) in [0, 1] where it is tracked, temporal_links (B, N, N) as [from, to]
            where they are, and ``state``, the new :class:`~memkern.ops.memory.MemoryState`.

        Raises:
            ValueError: ``x`` is not (B, input_dim), or the state does not fit.
        """
        if x.dim() != 2 or x.shape[1] != self.input_dim:
            raise ValueError(f"x: expected shape (B, {self.input_dim}), got {tuple(x.shape)}")
        if state is None:
            state = self.initial_state(x.shape[0], x.device)
        interface = self.interface(x)
        reads, state = memory_step(
            state,
            interface,
            sharpness=None if self.sharpness == 1.0 else self.sharpness,
            step_mask=step_mask,
            track_links=self.use_temporal_links,
            backend=self.backend,
        )
        out = None
        if self.output_proj is not None:
            out = self.output_proj(reads.flatten(1).to(self.output_proj.weight.dtype))
        info: dict[str, Any] = {
            "read_weights": state.read_weights,
            "write_weights": state.write_weights,
            "read_vectors": reads,
            "write_vectors": interface.write_vectors,
            "memory_state": state.memory,
        }
        if self.use_usage_tracking:
            info["usage"] = state.usage
        if self.use_temporal_links:
            info["temporal_links"] = temporal_links(state)
        info["state"] = state
        return out, info

    def get_memory_state(self) -> Tensor:
        """A copy of the memory that calls without a state start from: (N, W), or (B, N, W) as it was set."""
        if self._set_state is None:
            return self.write_gate.weight.new_zeros(self.memory_slots, self.memory_dim)
        memory = self._set_state.memory if isinstance(self._set_state, MemoryState) else self._set_state
        return memory.clone()

    def set_memory_state(self, state: Tensor | MemoryState) -> None:
        """Keep a copy of a memory (N, W) for every row, (B, N, W), or a whole state, as what documents start from.

        Raises:
            ValueError: another shape.
        """
        memory = state.memory if isinstance(state, MemoryState) else state
        expected = (self.memory_slots, self.memory_dim)
        if memory.dim() not in (2, 3) or tuple(memory.shape[-2:]) != expected:
            raise ValueError(
                f"memory state: expected shape {expected} or (B, {expected[0]}, {expected[1]}), "
                f"got {tuple(memory.shape)}"
            )
        self._set_state = copy_state(state)

    def reset_memory(self) -> None:
        """Forget what was set: documents start from an empty memory again."""
        self._set_state = None

    def visualize_memory(self, state: MemoryState | None = None) -> dict[str, Any]:
        """NumPy arrays of a state, by default of what was set: memory, usage and temporal_links where they are tracked.

        Without a batch axis where there is one row, as the earlier controller gave them.
        """
        if state is None:
            memory = self.get_memory_state()
            batch = memory.shape[0] if memory.dim() == 3 else 1
            state = self.initial_state(batch)
        shown = {"memory": state.memory}
        if self.use_usage_tracking:
            shown["usage"] = state.usage
        if self.use_temporal_links:
            shown["temporal_links"] = temporal_links(state)
        single = state.memory.shape[0] == 1
        return {name: (value[0] if single else value).detach().cpu().numpy() for name, value in shown.items()}

    def extra_repr(self) -> str:
        return (
            f"input_dim={self.input_dim}, memory_slots={self.memory_slots}, memory_dim={self.memory_dim}, "
            f"num_heads={self.num_heads}, use_temporal_links={self.use_temporal_links}, "
            f"use_usage_tracking={self.use_usage_tracking}, sharpness={self.sharpness}"
        )


def temporal_links(state: MemoryState) -> Tensor:
    """(B, N, N) as [from, to], in [0, 1]: the mean over the write heads, turned as the earlier interface had it."""
    return state.links.mean(1).transpose(1, 2)
