"""Generation after retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkern.models._devices import check_devices
from memkern.models.self_rag.retrieval import Retrieval
from memkern.models.self_rag.tokens import Retrieved

DEFAULT_NEW_TOKENS = 50


class Generation(Retrieval):
    """Part of :class:`SelfRAGModel`: the backbone generates behind what was retrieved for the prompt."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_memory: bool = True,
        *,
        retrieved: Retrieved | None = None,
        memory_groups: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Retrieve once for the prompt, then generate with the backbone; every option of its ``generate`` is passed on.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1.
            use_memory, retrieved, memory_groups: as in :meth:`forward`.
            max_new_tokens: 50 by default; ``max_length`` counts the input and the new tokens.

        Returns:
            (B, T + new) int64: the input as it was given, then the new tokens. The retrieved prefix is no part of it.
            With ``return_dict_in_generate=True``, transformers' output with these ``sequences``.
        """
        check_devices(self.backbone, "input_ids", input_ids, attention_mask=attention_mask)
        length = input_ids.shape[1]
        limit = kwargs.pop("max_length", None)
        if max_new_tokens is None:
            max_new_tokens = DEFAULT_NEW_TOKENS if limit is None else limit - length
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if (least := kwargs.pop("min_length", None)) is not None:
            kwargs["min_new_tokens"] = max(0, least - length)
        rows = input_ids.shape[0]
        if not use_memory or (retrieved is None and len(self.memory) == 0):
            retrieved = [[] for _ in range(rows)]
        elif retrieved is None:
            query = self.embed(input_ids, attention_mask, differentiable=False)
            retrieved = self.retrieve(query, groups=memory_groups)  # type: ignore[assignment]
        assert retrieved is not None
        room = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        longest = self.max_length if room is None else max(4, min(self.max_length, room - max_new_tokens))
        augmented = self.augment(input_ids, retrieved, attention_mask, padding_side="left", limit=longest)
        kwargs.setdefault("pad_token_id", self.pad_token_id)
        backbone: Any = self.backbone
        found = backbone.generate(
            input_ids=augmented.input_ids,
            attention_mask=augmented.attention_mask,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
        sequences = found if isinstance(found, Tensor) else found.sequences
        fresh = sequences[:, augmented.input_ids.shape[1] :]
        given = input_ids.repeat_interleave(fresh.shape[0] // max(rows, 1), 0)
        sequences = torch.cat((given, fresh.to(given.device)), 1)
        if isinstance(found, Tensor):
            return sequences
        found.sequences = sequences
        return found

    @property
    def generation_config(self) -> Any:
        """The backbone's, which is what generates."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if hasattr(self, "backbone"):
            self.backbone.generation_config = value

    @classmethod
    def can_generate(cls) -> bool:
        """False: ``generate`` is this class's own, none of what transformers does to a ``GenerationMixin`` applies."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's; adapters ask for it."""
        backbone: Any = self.backbone
        return backbone.prepare_inputs_for_generation(*args, **kwargs)
