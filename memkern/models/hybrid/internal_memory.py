"""The internal memory: a small matrix of fast weights in a layer, read by every token, updated once a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DECAY, EPSILON = 0.9, 1e-12


def update_internal_memory(memory: Tensor, projected: Tensor, update: Tensor, mask: Tensor | None = None) -> Tensor:
    """rownorm(0.9 M + 0.1 U^T P / T) over the unmasked tokens.

    Args:
        memory: (B, S, S) float.
        projected, update: (B, T, S) float, P and U.
        mask: (B, T) bool; a row without any token keeps its memory bit for bit.

    Returns:
        (B, S, S) in the dtype of ``memory``; rows of length 1, a zero row stays zero.
    """
    count = float(projected.shape[1])
    total: Tensor | float = count
    if mask is not None:
        projected = torch.where(mask[..., None], projected, 0.0)
        update = torch.where(mask[..., None], update, 0.0)
        total = mask.sum(1)[:, None, None]
    if projected.shape[1] == 0:
        return memory
    wide = memory.float() if memory.dtype != torch.float64 else memory
    outer = update.to(wide.dtype).transpose(1, 2) @ projected.to(wide.dtype)
    if isinstance(total, Tensor):
        outer = outer / total.clamp(min=1)
    else:
        outer = outer / total
    fresh = nn.functional.normalize(DECAY * wide + (1 - DECAY) * outer, dim=-1, eps=EPSILON).to(memory.dtype)
    return fresh if mask is None else torch.where(mask.any(1)[:, None, None], fresh, memory)


class InternalMemoryModule(nn.Module):
    """Reads M by every token and proposes the memory for the next call.

    P = H W_in, O = P M W_r, g = sigmoid(W_g [H; O] + b), context = g O; U = H W_u and
    M' = rownorm(0.9 M + 0.1 U^T P / T). A call reads the memory it came with: no token sees a later one through it.

    Args:
        mem_slots: S.
        head_size, num_heads: of earlier files; without effect.
        hidden_dim: D.
    """

    def __init__(self, mem_slots: int, head_size: int, hidden_dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.mem_slots, self.head_size, self.hidden_dim, self.num_heads = mem_slots, head_size, hidden_dim, num_heads
        self.initial_memory = nn.Parameter(torch.eye(mem_slots))
        self.input_proj = nn.Linear(hidden_dim, mem_slots, bias=False)
        self.read_proj = nn.Linear(mem_slots, hidden_dim, bias=False)
        self.update_proj = nn.Linear(hidden_dim, mem_slots, bias=False)
        self.gate_proj = nn.Linear(2 * hidden_dim, hidden_dim)

    def forward(
        self, hidden_states: Tensor, memory: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) attention outputs and (B, S, S) memory to (B, T, D) context and (B, S, S) next memory.

        Args:
            attention_mask: (B, T) bool or 0/1: tokens that count in the update.
        """
        projected = self.input_proj(hidden_states)
        read = self.read_proj(projected @ memory.to(projected.dtype))
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden_states, read), -1)))
        mask = None if attention_mask is None else attention_mask.bool()
        return gate * read, update_internal_memory(memory, projected, self.update_proj(hidden_states), mask)
