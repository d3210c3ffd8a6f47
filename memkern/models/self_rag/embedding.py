"""How a Self-RAG model embeds: pooled final states of its backbone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memkern.models._devices import check_devices
from memkern.models._positions import position_limit
from memkern.models.self_rag.augmentation import last_tokens
from memkern.models.self_rag.pooling import pool
from memkern.models.self_rag.tokens import Tokens

WRITE_BATCH = 64


class Embedding(Tokens):
    """Part of :class:`SelfRAGModel`: token ids to embeddings."""

    training: bool

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, differentiable: bool | None = None
    ) -> Tensor:
        """Pooled final states of the backbone, of unit length: (B, T) -> (B, D) float32.

        Always without dropout, so that the same tokens have one embedding.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1, padding on either side. Where a backbone has fewer positions than a row
                has tokens, the row's last ones count. A row without tokens gives zeros.
            differentiable: whether gradients flow; None: while training.
        """
        check_devices(self.backbone, "input_ids", input_ids, attention_mask=attention_mask)
        if input_ids.numel() == 0:
            return torch.zeros(input_ids.shape[0], self.config.d_model, device=input_ids.device)
        limit = position_limit(self.backbone, input_ids.shape[1])
        if limit is not None:
            input_ids, attention_mask = last_tokens(input_ids, attention_mask, limit, self.pad_token_id)
        differentiable = self.training if differentiable is None else differentiable
        training = [module for module in self.backbone.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                pooled = pool(self._states(input_ids, attention_mask), attention_mask, self.config.embed_pooling)
                pooled = pooled.float()
                return nn.functional.normalize(pooled, dim=-1) if self.config.normalize_embeddings else pooled
        finally:
            for module in training:
                module.training = True

    def _states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T, D) final normed states, absolute positions counted over the unmasked tokens."""
        decoder = self.backbone.get_decoder()
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(torch.int64)
            if "position_ids" in inspect.signature(decoder.forward).parameters:
                arguments["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        states: Tensor = decoder(**arguments).last_hidden_state
        return states

    def _embed_tokens(self, sequences: Sequence[Sequence[int]], *, differentiable: bool = False) -> Tensor:
        """(n,) token lists -> (n, D), in batches of like length."""
        device = self._embedding.device
        limit = self.max_length
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        size = len(sequences) if differentiable else WRITE_BATCH
        blocks = []
        for start in range(0, len(order), max(size, 1)):
            rows = [torch.tensor(list(sequences[i])[:limit], dtype=torch.int64) for i in order[start : start + size]]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id).to(device)
            lengths = torch.tensor([row.numel() for row in rows], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            blocks.append(self.embed(ids, mask, differentiable=differentiable))
        if not blocks:
            return torch.zeros(0, self.config.d_model, device=device)
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return torch.cat(blocks)[back.to(device)]
