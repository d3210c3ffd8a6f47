"""A small decoder as any Self-RAG model may stand on: rotary positions, RMSNorm, SwiGLU, tied embeddings.

Attention goes through transformers' registry, so SDPA, FlashAttention, flex attention and eager all work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkern.models._compat import CACHE, DictOutput, causal_mask, given_cache, init
from memkern.models.self_rag.configuration_self_rag import SelfRAGConfig
from memkern.models.self_rag.pooling import pool


@dataclass
class SelfRAGTransformerOutput(DictOutput, CausalLMOutputWithPast):
    """Loss, logits (B, T, V), cache, and what was asked for of hidden states and attentions."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryPositions(nn.Module):
    """Cosines and sines of the rotary angles, half-split (Su et al. 2021)."""

    inverse_frequencies: Tensor

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width, self.theta = width, theta
        self.register_buffer("inverse_frequencies", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        return self.theta ** -(torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> cosines and sines (B, 1, T, width)."""
        angles = position_ids[:, None, :, None].float() * self.inverse_frequencies.float()
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(B, H, T, d) turned by its positions' angles."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention that also returns its weights; the mask is additive."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores.float(), -1).to(query.dtype)
    kept = nn.functional.dropout(weights, dropout, module.training)
    return (kept @ value).transpose(1, 2).contiguous(), weights


class SelfRAGAttention(nn.Module):
    """Causal multi-head attention without biases."""

    def __init__(self, config: SelfRAGConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling, self.is_causal, self.num_key_value_groups = config.head_dim**-0.5, True, 1
        width = config.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, hiddens: Tensor, attention_mask: Any, positions: tuple[Tensor, Tensor], cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hiddens.shape[:-1], hiddens.shape[-1] // self.config.head_dim, self.config.head_dim)
        query, key, value = (p(hiddens).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, *positions), rotate(key, *positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend: Callable[..., Any] = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(mixed.reshape(hiddens.shape)), weights


class SelfRAGLayer(GradientCheckpointingLayer):
    """Attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, config: SelfRAGConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = SelfRAGAttention(config, layer_idx)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hiddens: Tensor,
        attention_mask: Any,
        positions: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.self_attn(self.input_norm(hiddens), attention_mask, positions, past_key_values, **kwargs)
        hiddens = hiddens + self.dropout(mixed)
        inner = self.mlp_norm(hiddens)
        inner = self.down_proj(nn.functional.silu(self.gate_proj(inner)) * self.up_proj(inner))
        return hiddens + self.dropout(inner), weights


class SelfRAGDecoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: SelfRAGConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = RotaryPositions(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(SelfRAGLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        past = given_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds, got both or neither")
        embeddings: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past is None else past.get_seq_length()
            position_ids = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()
        mask = causal_mask(self.config, embeddings, attention_mask, past, position_ids)
        positions = self.rotary(position_ids, embeddings.dtype)
        hiddens: Tensor = self.dropout(embeddings)
        states: list[Tensor] = [hiddens]
        weights: list[Any] = []
        for layer in self.layers:
            hiddens, attention = layer(hiddens, mask, positions, past, **kwargs)
            states.append(hiddens)
            weights.append(attention)
        hiddens = self.norm(hiddens)
        states[-1] = hiddens
        return BaseModelOutputWithPast(
            last_hidden_state=hiddens,
            **{CACHE: past},
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class SelfRAGPreTrainedModel(PreTrainedModel):
    """What the transformer and the Self-RAG model share: loading, attention dispatch, initialisation."""

    config: SelfRAGConfig
    config_class = SelfRAGConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["SelfRAGLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryPositions):
            with torch.no_grad():
                module.inverse_frequencies.copy_(module.frequencies())

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class SelfRAGTransformer(SelfRAGPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, tied to the embedding.

    Args:
        config: sizes; the fields of the store are not used here.
    """

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SelfRAGConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = SelfRAGDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self, *_: Any) -> nn.Module:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> SelfRAGTransformerOutput | tuple[Any, ...]:
        """(B, T) token ids to next-token logits.

        Args:
            input_ids: (B, T) int64; or ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T) bool or 0/1 of any dtype, padding on either side.
            labels: (B, T) int64 for the shifted cross-entropy; -100 is ignored.
            logits_to_keep: the last so many positions get logits; 0 for all.
            return_dict: False gives the tuple of what is present: (loss, logits, cache, ...).
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        found = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=_asked(output_hidden_states, self.config.output_hidden_states),
            output_attentions=_asked(output_attentions, self.config.output_attentions),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = SelfRAGTransformerOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(found, CACHE)},
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
        return output.to_tuple() if _wants_tuple(return_dict, self.config) else output

    def forward_embed_only(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pooling: str | None = None
    ) -> Tensor:
        """Pooled final states without the language-model head: (B, T) -> (B, D), not normalised."""
        states = self.model(input_ids, attention_mask).last_hidden_state
        return pool(states, attention_mask, pooling or self.config.embed_pooling)


def _asked(given: bool | None, default: Any) -> bool:
    return bool(default) if given is None else given


def _wants_tuple(return_dict: bool | None, config: Any) -> bool:
    return not (return_dict if return_dict is not None else getattr(config, "return_dict", True))
