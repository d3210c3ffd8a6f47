"""How a read enters the token states before the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from memkern.nn._init import XavierLinear, ZeroLinear


class MemoryFusion(nn.Module):
    """h + g(h) * O(attention of h over the memory): gated cross-attention whose output projection starts at zero.

    Each head may also attend to nothing, a slot of score and value zero, so that one slot alone is no constant and a
    token that needs no memory takes none. The gate is one logistic value per token and head. A fresh module returns its
    input bit for bit.

    Args:
        hidden_dim: D, a multiple of ``num_heads``.
        num_heads: attention heads.

    Raises:
        ValueError: ``hidden_dim`` is no multiple of ``num_heads``.

    Source: Vaswani et al. (2017) for the attention; the zero start is that of Alayrac et al., "Flamingo" (2022).
    """

    def __init__(self, hidden_dim: int, num_heads: int = 1) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim ({hidden_dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.query = XavierLinear(hidden_dim, hidden_dim)
        self.key = XavierLinear(hidden_dim, hidden_dim, bias=False)
        self.value = XavierLinear(hidden_dim, hidden_dim)
        self.gate = XavierLinear(hidden_dim, num_heads)
        self.output = ZeroLinear(hidden_dim, hidden_dim)

    def forward(self, hiddens: Tensor, memory: Tensor) -> Tensor:
        """(B, T, D) and (B, S, D) -> (B, T, D) in the dtype of ``hiddens``."""
        batch, length, width = hiddens.shape
        memory = memory.to(hiddens.dtype)

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        keys = functional.pad(heads(self.key(memory)), (0, 0, 0, 1))
        values = functional.pad(heads(self.value(memory)), (0, 0, 0, 1))
        read = functional.scaled_dot_product_attention(heads(self.query(hiddens)), keys, values)
        gated = read.transpose(1, 2) * torch.sigmoid(self.gate(hiddens))[..., None].to(read.dtype)
        return hiddens + self.output(gated.reshape(batch, length, width)).to(hiddens.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
