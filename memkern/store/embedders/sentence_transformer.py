"""A SentenceTransformer as an embedder, with its own prompts for queries and documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkern.store.embedders.base import check_kind


class SentenceTransformerEmbedder:
    """Wraps a ``sentence_transformers.SentenceTransformer`` or the name of one.

    Args:
        model: the model, or a folder or hub name.
        query_prompt, document_prompt: put before each text of that kind; by default the model's own ``query`` and
            ``document`` prompts, where it has them.
    """

    def __init__(self, model: Any, *, query_prompt: str | None = None, document_prompt: str | None = None) -> None:
        if isinstance(model, str):
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError("SentenceTransformers need: pip install 'memkern[search]'") from error
            model = SentenceTransformer(model)
        self.model = model
        own = getattr(model, "prompts", None) or {}
        self.prompts = {
            "query": own.get("query", "") if query_prompt is None else query_prompt,
            "document": own.get("document", "") if document_prompt is None else document_prompt,
        }

    @property
    def d_model(self) -> int:
        return int(self.model.get_sentence_embedding_dimension())

    def encode(self, texts: str | Sequence[str], kind: str = "document") -> Tensor:
        """(n,) texts -> (n, d_model) float32 unit rows on the CPU."""
        check_kind(kind)
        if isinstance(texts, str):
            return self.encode([texts], kind)[0]
        if not texts:
            return torch.zeros(0, self.d_model, dtype=torch.float32, device="cpu")
        rows = self.model.encode(
            [self.prompts[kind] + text for text in texts],
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return rows.float().cpu()
