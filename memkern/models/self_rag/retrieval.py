"""What a Self-RAG model does with its store: writing, retrieving, and learning to retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from memkern.backends import use_backend
from memkern.models.self_rag.contrastive import info_nce
from memkern.models.self_rag.embedding import Embedding
from memkern.models.self_rag.embedding_cache import EmbeddingCache
from memkern.models.self_rag.tokens import int_list
from memkern.ops import cosine_topk
from memkern.store import Hit, MemoryStore


class BilinearScore(nn.Module):
    """q^T W c, the identity at first: how ``retrieval_method="learned"`` scores a chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, queries: Tensor) -> Tensor:
        """(B, D) queries as the chunks see them: (B, D)."""
        return queries.to(self.weight.dtype) @ self.weight


class Retrieval(Embedding):
    """Part of :class:`SelfRAGModel`: the store behind it."""

    memory: MemoryStore
    score: BilinearScore | None
    embedding_cache: EmbeddingCache
    _score_state: tuple[int, int] | None

    def write_to_memory(
        self,
        text: str | Sequence[str],
        token_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
        metadata: Any = None,
    ) -> int | list[int]:
        """Embed texts and store them, one chunk each.

        Args:
            text: a text, or a list of them.
            token_ids: its token ids (a list of them for a list of texts); None asks the tokenizer.
            metadata: a dict (a list of them for a list of texts), or None.

        Returns:
            The chunk's id, or the list of ids.
        """
        if isinstance(text, str):
            tokens = None if token_ids is None else [int_list(token_ids)]
            return self._write([text], tokens, [metadata])[0]
        texts = list(text)
        tokens = None if token_ids is None else [int_list(ids) for ids in token_ids]
        if tokens is not None and len(tokens) != len(texts):
            raise ValueError(f"token_ids: expected {len(texts)} sequences, one for each text, got {len(tokens)}")
        metas = [metadata] * len(texts) if metadata is None or isinstance(metadata, dict) else list(metadata)
        return self._write(texts, tokens, metas)

    def _write(self, texts: list[str], tokens: list[list[int]] | None, metas: list[Any]) -> list[int]:
        if not texts:
            return []
        tokens = [self._tokens(text) for text in texts] if tokens is None else tokens
        self.embedding_cache.check(cast(nn.Module, self))
        rows = [self.embedding_cache.get(ids) for ids in tokens]
        missing = [i for i, row in enumerate(rows) if row is None]
        fresh = self._embed_tokens([tokens[i] for i in missing])
        for i, row in zip(missing, fresh, strict=True):
            rows[i] = row
            self.embedding_cache.put(tokens[i], row)
        embeddings = torch.stack([row for row in rows if row is not None])
        with self._chosen_backend():
            return self.memory.add_batch(texts, embeddings, metas, token_ids=tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def retrieve(
        self, query_emb: Tensor, top_k: int | None = None, *, groups: Sequence[Any] | None = None
    ) -> list[list[Hit]] | list[Hit]:
        """The best chunks for (B, D) query embeddings: a list of hits per row, or one list for a (D,) query.

        Args:
            query_emb: (B, D) or (D,).
            top_k: 1 to 2048, ``config.top_k`` by default; fewer hits where the store has fewer.
            groups: B values; a row finds only chunks whose metadata has its value under ``"group"``.
        """
        top_k = self.config.top_k if top_k is None else top_k
        self._sync_score()
        rows = query_emb.detach()
        if groups is not None:
            return self._retrieve_grouped(rows, top_k, list(groups))
        if self.score is not None and self.memory.retrieval_method == "cosine":
            rows = self.score(rows.to(self.score.weight.device)).detach().float()
        with self._chosen_backend():
            return self.memory.search(rows, top_k) if rows.dim() == 1 else self.memory.search_batched(rows, top_k)

    def _chosen_backend(self) -> AbstractContextManager[Any]:
        """The configured backend for what the store runs; without one, whatever is chosen for all."""
        name = self.config.memory_backend
        return nullcontext() if name is None else use_backend(name)

    def _sync_score(self) -> None:
        """The store scores by the matrix as it is now, if it is a store that has one."""
        if self.score is None or self.memory.retrieval_method != "learned":
            return
        weight = self.score.weight
        state = (weight.data_ptr(), weight._version)
        if state != self._score_state:
            self.memory.score_matrix = weight
            self._score_state = state

    def _retrieve_grouped(self, rows: Tensor, top_k: int, groups: list[Any]) -> list[list[Hit]]:
        store = self.memory
        if not len(store):
            return [[] for _ in groups]
        number: dict[Any, int] = {}
        wanted = torch.tensor([number.setdefault(group, len(number)) for group in groups], device=store.device)
        metadata, ids, texts, tokens = store.metadata, store.ids, store.chunks, store.token_ids
        owned = torch.tensor([number.get(meta.get("group"), -1) for meta in metadata], device=store.device)
        rows = rows.to(store.device, torch.float32)
        if self.score is not None:
            rows = self.score(rows).detach().to(store.device, torch.float32)
        found = cosine_topk(
            rows.to(store.dtype),
            store.embeddings,
            min(top_k, len(store)),
            query_group=wanted,
            row_group=owned,
            normalized=self.config.retrieval_method == "dot",
            backend=self.config.memory_backend,
        )
        return [
            [Hit(ids[i], texts[i], tokens[i], s, metadata[i]) for i, s in zip(places, scores, strict=True) if i >= 0]
            for places, scores in zip(found.indices.tolist(), found.scores.tolist(), strict=True)
        ]

    def contrastive_loss(self, query: Tensor, positive_ids: Tensor, *, groups: Sequence[Any] | None = None) -> Tensor:
        """InfoNCE of (B, D) queries against stored chunks, embedded anew so that both sides carry gradient.

        A query is contrasted with every chunk of the store (of its group); in a large store with the positives and the
        hardest, up to ``config.contrastive_candidates``. Chunks with the tokens of the positive are left out.

        Args:
            query: (B, D) embeddings with gradient.
            positive_ids: (B,) int64 ids in the store, -1 for none.
            groups: B values as for :meth:`retrieve`.

        Returns:
            () float, unweighted; 0 when no row has a positive.

        Raises:
            ValueError: a positive id that the store does not hold.
        """
        store = self.memory
        place = {id: i for i, id in enumerate(store.ids)}
        wanted = [int(i) for i in positive_ids.tolist()]
        for id in wanted:
            if id != -1 and id not in place:
                raise ValueError(f"positive_ids: no chunk has id {id}: it is unknown, deleted or evicted")
        positives = torch.tensor([place.get(id, -1) for id in wanted], dtype=torch.int64)
        chosen = self._candidates(query, positives)
        tokens, metadata = store.token_ids, store.metadata
        sequences: list[Sequence[int]] = []
        for i in chosen.tolist():
            found = tokens[i]
            sequences.append(found if found is not None else self._tokens(store.chunks[i]))
        gradient = query.requires_grad and torch.is_grad_enabled()
        chunks = self._embed_tokens(sequences, differentiable=gradient)
        column = {i: c for c, i in enumerate(chosen.tolist())}
        columns = torch.tensor([column.get(i, -1) for i in positives.tolist()], device=query.device)
        allowed = torch.ones(len(wanted), len(sequences), dtype=torch.bool)
        if groups is not None:
            owner = [metadata[i].get("group") for i in chosen.tolist()]
            allowed = torch.tensor([[have == group for have in owner] for group in groups], dtype=torch.bool)
        for row, c in enumerate(columns.tolist()):
            if c >= 0:
                allowed[row] &= torch.tensor([tuple(s) != tuple(sequences[c]) for s in sequences])
        scores = query if self.score is None else self.score(query)
        if self.config.retrieval_method != "dot":
            scores, chunks = nn.functional.normalize(scores, dim=-1), nn.functional.normalize(chunks, dim=-1)
        scores = scores @ chunks.to(scores.dtype).t()
        return info_nce(scores, columns, self.config.contrastive_temperature, allowed.to(query.device))

    def _candidates(self, query: Tensor, positives: Tensor) -> Tensor:
        """(C,) places in the store: all, or the positives and the hardest by the embeddings that the store holds."""
        size, limit = len(self.memory), self.config.contrastive_candidates
        if size <= limit:
            return torch.arange(size)
        sure = positives[positives >= 0].unique()
        rows = query.detach() if self.score is None else self.score(query).detach()
        each = max(1, (limit - sure.numel()) // max(1, query.shape[0]))
        found = cosine_topk(
            rows.to(self.memory.device, self.memory.dtype),
            self.memory.embeddings,
            min(each + 1, size),
            normalized=self.config.retrieval_method == "dot",
            backend=self.config.memory_backend,
        )
        return torch.cat((sure, found.indices.flatten().cpu())).unique()
