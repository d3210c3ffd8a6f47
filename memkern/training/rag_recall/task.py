"""The position-recall task as Self-RAG meets it: documents of facts, a question about each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memkern.data.generators import position_recall
from memkern.data.generators.recall import MEM, PAD, RECALL, SEP
from memkern.models.self_rag import SelfRAGConfig


@dataclass(frozen=True)
class RecallSettings:
    """Sizes of the task, of the model and of its training; the defaults are the published protocol.

    A fact is two tokens, key and value, of ``STORE key = value``; a question is ``RECALL key``. The keys of a document
    differ. The reader learns with few keys first: with all of them from the start its lookup does not form in minutes.
    """

    facts: int = 32
    keys: int = 32
    values: int = 16
    bins: int = 8
    chunks: int = 4  # read at inference
    queries_per_bin: int = 1600  # pooled over the seeds
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 256
    rope_theta: float = 100.0
    init_std: float = 0.09
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    reader_documents: int = 32
    reader_questions: int = 4  # of each document, one after another
    lookup: float = 0.85  # running accuracy at which the number of keys doubles
    reader_steps: int = 1500  # at most
    batch_documents: int = 4
    batch_questions: int = 16  # of each document
    sure: float = 0.97  # running accuracy at which the learning rate starts to fall
    retriever_steps: int = 2500  # at most, until then
    anneal_steps: int = 200
    contrastive_weight: float = 0.3
    contrastive_temperature: float = 0.05

    def config(self) -> SelfRAGConfig:
        """The Self-RAG configuration of the task."""
        return SelfRAGConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            d_ff=self.d_ff,
            vocab_size=position_recall(0, self.facts, keys=self.keys, values=self.values).vocabulary,
            max_seq_len=3 * self.facts + 8,
            max_chunks=self.facts * max(self.batch_documents, 4),
            top_k=self.chunks,
            memory_token_id=MEM,
            sep_token_id=SEP,
            pad_token_id=PAD,
            rope_theta=self.rope_theta,
            init_std=self.init_std,
            dropout=0.0,
            attention_dropout=0.0,
            memory_dropout=0.0,
            contrastive_weight=self.contrastive_weight,
            contrastive_temperature=self.contrastive_temperature,
            contrastive_candidates=self.facts * max(self.batch_documents, 4),
        )


@dataclass(frozen=True)
class Documents:
    """D documents of N facts, and a question about every one of them."""

    facts: Tensor  # (D, N, 2) int64: key, value
    questions: Tensor  # (D, N, 2) int64: RECALL, key

    @property
    def answers(self) -> Tensor:
        """(D, N) int64: the values."""
        return self.facts[..., 1]


def draw(
    settings: RecallSettings, count: int, seed: int, *, facts: int | None = None, keys: int | None = None
) -> Documents:
    """``count`` documents, of all facts and keys or of fewer; the same seed gives the same ones."""
    facts, keys = facts or settings.facts, keys or settings.keys
    drawn = position_recall(count, facts, keys=keys, values=settings.values, seed=seed)
    # Values keep their token ids whatever the number of keys.
    key, value = drawn.facts[..., 1], drawn.facts[..., 3] + settings.keys - keys
    return Documents(torch.stack((key, value), -1), torch.stack((torch.full_like(key, RECALL), key), -1))


def with_distractors(facts: int, wanted: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """(Q,) wanted places to (Q, k): each and k - 1 random others, in random order."""
    scores = torch.rand(wanted.numel(), facts, generator=generator)
    scores[torch.arange(wanted.numel()), wanted] = 2.0
    chosen = scores.topk(k, 1).indices
    order = torch.rand(chosen.shape, generator=generator).argsort(1)
    return chosen.gather(1, order)
