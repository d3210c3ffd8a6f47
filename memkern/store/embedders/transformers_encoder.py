"""Any transformers encoder, or a model of ours with ``embed``, as an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkern.store.embedders.base import check_kind

POOLINGS = ("mean", "cls", "last")


class TransformersEmbedder:
    """Pools the last hidden states of a transformers model over the unmasked tokens.

    Args:
        model: a transformers model whose output has ``last_hidden_state``, or one with ``embed(input_ids,
            attention_mask) -> (n, d)``.
        tokenizer: its tokenizer, with a padding token.
        pooling: ``"mean"``, ``"cls"`` (the first token) or ``"last"`` (the last unmasked one).
        batch_size: texts at once.
        max_length: longer texts are cut.
        query_prompt, document_prompt: put before each text of that kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        batch_size: int = 32,
        max_length: int = 512,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: has no padding token; set tokenizer.pad_token")
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.batch_size, self.max_length = batch_size, max_length
        self.prompts = {"query": query_prompt, "document": document_prompt}

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> TransformersEmbedder:
        """Load model and tokenizer from a folder or a hub name."""
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("transformers encoders need: pip install 'memkern[models]'") from error
        return cls(AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name), **options)

    @property
    def d_model(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: str | Sequence[str], kind: str = "document") -> Tensor:
        """(n,) texts -> (n, d_model) float32 unit rows on the CPU."""
        check_kind(kind)
        if isinstance(texts, str):
            return self.encode([texts], kind)[0]
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        rows = []
        try:
            for start in range(0, len(texts), self.batch_size):
                batch = [self.prompts[kind] + text for text in texts[start : start + self.batch_size]]
                encoded = self.tokenizer(
                    batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                )
                ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
                with torch.no_grad():
                    rows.append(self._pool(ids, mask).float().cpu())
        finally:
            self.model.train(training)
        if not rows:
            return torch.zeros(0, self.d_model, dtype=torch.float32, device="cpu")
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    def _pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        if hasattr(self.model, "embed"):
            pooled: Tensor = self.model.embed(ids, mask)
            return pooled
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.to(states.dtype)
        if self.pooling == "mean":
            return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        # Positions of the first and last unmasked token, whichever side the padding is on.
        positions = mask.argmax(1) if self.pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return states[torch.arange(len(states), device=states.device), positions]
