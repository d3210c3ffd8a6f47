"""The tokens of a Self-RAG model: its marks, its limits, and chunks put before an input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from memkern.models.self_rag.augmentation import Augmented, augment_rows
from memkern.store import Hit

Retrieved = Sequence[Sequence[Hit | Sequence[int]]]


class Tokens:
    """Part of :class:`SelfRAGModel`: the tokenizer, the two marks, and augmented rows."""

    config: Any  # a SelfRAGConfig
    backbone: Any
    tokenizer: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    @property
    def _embedding(self) -> Tensor:
        """(V, D) of the backbone."""
        weight = self.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Use this tokenizer; it gets the two marks if it lacks them, and the embedding rows for them."""
        wanted = [self.config.memory_token, self.config.sep_token]
        known = tokenizer.get_vocab()
        missing = [token for token in wanted if token not in known]
        if missing:
            warnings.warn(f"the tokenizer has no {' and no '.join(missing)}: added", stacklevel=3)
            tokenizer.add_tokens(missing, special_tokens=True)
        self.tokenizer = tokenizer
        self.config.memory_token_id, self.config.sep_token_id = tokenizer.convert_tokens_to_ids(wanted)
        if len(tokenizer) > self._embedding.shape[0]:
            self.backbone.resize_token_embeddings(len(tokenizer))
            self.config.vocab_size = len(tokenizer)

    @property
    def memory_token_id(self) -> int:
        """The mark before each chunk; without a tokenizer or a configured id, the last but one of the vocabulary."""
        configured = self.config.memory_token_id
        return int(self.config.vocab_size - 2 if configured is None else configured)

    @property
    def sep_token_id(self) -> int:
        """The mark after the last chunk; without a tokenizer or a configured id, the last of the vocabulary."""
        configured = self.config.sep_token_id
        return int(self.config.vocab_size - 1 if configured is None else configured)

    @property
    def pad_token_id(self) -> int:
        for source in (self.tokenizer, self.config, self.backbone.config.get_text_config()):
            found = getattr(source, "pad_token_id", None)
            if found is not None:
                return int(found)
        return 0

    @property
    def max_length(self) -> int:
        """Longest augmented sequence: the configured one, or what the backbone's positions allow."""
        allowed = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        return self.config.max_seq_len if allowed is None else min(self.config.max_seq_len, allowed)

    def _tokens(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("token_ids: a model without a tokenizer needs the token ids of a text")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def augment(
        self,
        input_ids: Tensor,
        retrieved: Retrieved,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        padding_side: str = "right",
        limit: int | None = None,
    ) -> Augmented:
        """``[MEM] c1 [MEM] c2 [SEP] input`` row by row.

        When a row is too long its prefix gives way first (down to a quarter of the limit), then the input keeps its
        last tokens, at least half the limit; the separator always stays.

        Args:
            input_ids: (B, T) int64.
            retrieved: B lists of hits (or of token id lists), best first. A row without any stays as it is.
            attention_mask: (B, T) bool or 0/1, padding on either side; it is dropped.
            labels: (B, T) int64; they move with their tokens, the prefix gets -100.
            padding_side: where the shorter rows of the result are padded.
            limit: longest row; ``config.max_seq_len`` (or the backbone's positions) by default.

        Returns:
            Augmented: (input_ids, attention_mask, labels), (B, T') each; labels None where none were given.
        """
        if len(retrieved) != input_ids.shape[0]:
            raise ValueError(f"retrieved: expected {input_ids.shape[0]} lists, one for each row, got {len(retrieved)}")
        return augment_rows(
            input_ids,
            [[self._chunk_tokens(chunk) for chunk in row] for row in retrieved],
            attention_mask,
            labels,
            memory_id=self.memory_token_id,
            separator_id=self.sep_token_id,
            pad_id=self.pad_token_id,
            limit=self.max_length if limit is None else limit,
            padding_side=padding_side,
        )

    def _chunk_tokens(self, chunk: Hit | Sequence[int]) -> Sequence[int]:
        if not isinstance(chunk, Hit):
            return int_list(chunk)
        return self._tokens(chunk.text) if chunk.token_ids is None else chunk.token_ids


def int_list(tokens: Any) -> list[int]:
    """Token ids from a tensor or a sequence."""
    return [int(t) for t in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]
