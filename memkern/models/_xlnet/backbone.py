"""XLNet's encoder with what transformers leaves out: activation checkpointing and scaled dot-product attention.

The parameters, their names and, with the default attention, every bit of the result are those of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import XLNetConfig, XLNetModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.xlnet.modeling_xlnet import XLNetLayer, XLNetRelativeAttention


class MemXLNetRelativeAttention(XLNetRelativeAttention):
    """Relative attention that follows ``config._attn_implementation``: "eager" is transformers' own, "sdpa" fused."""

    config: XLNetConfig

    def rel_attn_core(
        self,
        q_head: Tensor,
        k_head_h: Tensor,
        v_head_h: Tensor,
        k_head_r: Tensor,
        seg_mat: Tensor | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """Heads are (length, batch, heads, width); see transformers. Probabilities are only given by the eager form."""
        if self.config._attn_implementation != "sdpa" or output_attentions:
            return super().rel_attn_core(
                q_head, k_head_h, v_head_h, k_head_r, seg_mat, attn_mask, output_attentions=output_attentions
            )
        keys = k_head_h.shape[0]
        position = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)
        bias = self.rel_shift_bnij(position, klen=keys)
        if seg_mat is not None:
            segment = torch.einsum("ibnd,snd->ibns", q_head + self.r_s_bias, self.seg_embed)
            bias = bias + torch.einsum("ijbs,ibns->bnij", seg_mat, segment)
        bias = bias * self.scale
        if attn_mask is not None:
            blocked = 65500 if attn_mask.dtype == torch.float16 else 1e30
            bias = bias - blocked * torch.einsum("ijbn->bnij", attn_mask)
        read = functional.scaled_dot_product_attention(
            (q_head + self.r_w_bias).permute(1, 2, 0, 3),
            k_head_h.permute(1, 2, 0, 3),
            v_head_h.permute(1, 2, 0, 3),
            attn_mask=bias,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.scale,
        )
        return read.permute(2, 0, 1, 3)


class MemXLNetLayer(GradientCheckpointingLayer, XLNetLayer):
    """A layer that recomputes its activations in backward when checkpointing is on."""

    # The mixin wraps the forward that its subclass defines itself.
    def forward(self, output_h: Tensor, output_g: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' layer; the hidden states come by position, as reentrant checkpointing needs them."""
        return XLNetLayer.forward(self, output_h, output_g, *args, **kwargs)


class MemXLNetModel(XLNetModel):
    """XLNet's encoder, of one dtype throughout, with :class:`MemXLNetLayer` for its layers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        layer: Any
        for layer in self.layer:
            layer.__class__ = MemXLNetLayer
            layer.rel_attn.__class__ = MemXLNetRelativeAttention
            layer.rel_attn.config = config
        # transformers makes some parameters by a constructor that ignores the default dtype.
        nn.Module.to(self, torch.get_default_dtype())

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """ "eager" unless "sdpa" is asked for: the default has to equal transformers bit for bit."""
        return attention_choice(requested_attention)


def attention_choice(requested: str | None) -> str:
    """The attention implementation of this name; None is "eager".

    Raises:
        ValueError: XLNet's relative attention has no such form.
    """
    if requested in (None, "eager", "sdpa"):
        return requested or "eager"
    raise ValueError(f"attn_implementation must be 'eager' or 'sdpa' for XLNet's relative attention, got {requested!r}")
