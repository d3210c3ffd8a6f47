"""A causal LM that retrieves from a store by its own embeddings and reads what it found before its input.

"Self-RAG" here means retrieval by the model's own embeddings. It is not the method of that name with reflection tokens
(Asai et al. 2023).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memkern.backends import use_backend
from memkern.models._compat import CACHE, DictOutput, init
from memkern.models._losses import shifted_cross_entropy
from memkern.models.self_rag.augmentation import Augmented, augment_rows
from memkern.models.self_rag.configuration_self_rag import SelfRAGConfig
from memkern.models.self_rag.contrastive import info_nce
from memkern.models.self_rag.embedding_cache import EmbeddingCache
from memkern.models.self_rag.modeling_transformer import (
    SelfRAGPreTrainedModel,
    SelfRAGTransformer,
    _wants_tuple,
)
from memkern.models.self_rag.pooling import pool
from memkern.ops import cosine_topk
from memkern.store import Hit, MemoryStore

Retrieved = Sequence[Sequence[Hit | Sequence[int]]]

MEMORY_FOLDER = "memory"
WRITE_BATCH = 64
DEFAULT_NEW_TOKENS = 50


@dataclass
class SelfRAGOutput(DictOutput, CausalLMOutputWithPast):
    """What :meth:`SelfRAGModel.forward` returns; ``loss`` is lm_loss + contrastive_weight * contrastive_loss,
    ``logits`` (B, T', V) cover the augmented sequence."""

    lm_loss: Tensor | None = None  # ()
    contrastive_loss: Tensor | None = None  # () unweighted
    retrieved: list[list[Hit]] | None = None


class BilinearScore(nn.Module):
    """q^T W c, the identity at first: how ``retrieval_method="learned"`` scores a chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, queries: Tensor) -> Tensor:
        """(B, D) queries as the chunks see them: (B, D)."""
        return queries.to(self.weight.dtype) @ self.weight


class SelfRAGModel(SelfRAGPreTrainedModel):
    """Retrieval-augmented causal LM over a :class:`memkern.store.MemoryStore`.

    Args:
        base_model: any causal LM of transformers, or :class:`SelfRAGTransformer`; a :class:`SelfRAGConfig` alone builds
            a fresh one.
        memory: the store; a fresh one by default. Its ``d_model`` is the backbone's hidden size.
        config: None takes the defaults and the backbone's sizes.
        tokenizer: turns text into tokens. Without one, chunks need ``token_ids``.

    Raises:
        ValueError: sizes that do not fit together.
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        base_model: PreTrainedModel | SelfRAGConfig,
        memory: MemoryStore | None = None,
        config: SelfRAGConfig | None = None,
        tokenizer: Any = None,
    ) -> None:
        if isinstance(base_model, PreTrainedConfig):
            config, backbone = base_model, None
        else:
            backbone = base_model
            config = _fitted(config, backbone)
        super().__init__(config)
        if backbone is None:
            backbone = (
                SelfRAGTransformer(config)
                if config.text_config is None
                else AutoModelForCausalLM.from_config(config.text_config)
            )
        else:
            # It has its weights already; post_init below is for what stands beside it.
            for module in backbone.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.backbone = backbone
        self.score = BilinearScore(config.d_model) if config.retrieval_method == "learned" else None
        if memory is None:
            memory = MemoryStore(config.d_model, config.max_chunks, retrieval_method=config.retrieval_method)
        if memory.d_model != config.d_model:
            raise ValueError(f"memory: expected d_model={config.d_model}, got a store of d_model={memory.d_model}")
        # A cosine store serves every method: queries go through the learned matrix before the search, and the inner
        # product of unit rows is their cosine.
        plain = memory.retrieval_method == "cosine" and (
            config.retrieval_method != "dot" or config.normalize_embeddings
        )
        if memory.retrieval_method != config.retrieval_method and not plain:
            raise ValueError(
                f"memory: expected retrieval_method={config.retrieval_method!r}, as in the configuration, got a store "
                f"with {memory.retrieval_method!r}"
            )
        self.memory = memory
        self.embedding_cache = EmbeddingCache(config.max_chunks)
        self.tokenizer: Any = None
        self._score_state: tuple[int, int] | None = None
        self.post_init()
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BilinearScore):
            init.eye_(module.weight)
        else:
            super()._init_weights(module)

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

    # Tokens

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

    # Embeddings

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, differentiable: bool | None = None
    ) -> Tensor:
        """Pooled final states of the backbone, of unit length: (B, T) -> (B, D) float32.

        Always without dropout, so that the same tokens have one embedding.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1, padding on either side.
            differentiable: whether gradients flow; None: while training.
        """
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

    # Memory

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
            tokens = None if token_ids is None else [_int_list(token_ids)]
            return self._write([text], tokens, [metadata])[0]
        texts = list(text)
        tokens = None if token_ids is None else [_int_list(ids) for ids in token_ids]
        if tokens is not None and len(tokens) != len(texts):
            raise ValueError(f"token_ids: expected {len(texts)} sequences, one for each text, got {len(tokens)}")
        metas = [metadata] * len(texts) if metadata is None or isinstance(metadata, dict) else list(metadata)
        return self._write(texts, tokens, metas)

    def _write(self, texts: list[str], tokens: list[list[int]] | None, metas: list[Any]) -> list[int]:
        if not texts:
            return []
        tokens = [self._tokens(text) for text in texts] if tokens is None else tokens
        self.embedding_cache.check(self)
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

    # Reading what was retrieved

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
            return _int_list(chunk)
        return self._tokens(chunk.text) if chunk.token_ids is None else chunk.token_ids

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_memory: bool = True,
        positive_ids: Tensor | None = None,
        return_retrieved: bool = False,
        *,
        retrieved: Retrieved | None = None,
        memory_groups: Sequence[Any] | None = None,
        document_mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SelfRAGOutput | tuple[Any, ...]:
        """Retrieve for each row, put the chunks before it, and predict the next tokens.

        The query is what a row gives away: the tokens whose label is -100 where there are such, otherwise all of them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1, padding on either side.
            labels: (B, T) int64 for the shifted cross-entropy, -100 ignored.
            use_memory: False, or an empty store, computes what the backbone alone does.
            positive_ids: (B,) int64 ids of the stored chunk that answers each row, -1 for none: the contrastive loss.
            return_retrieved: put the hits into ``retrieved``.
            retrieved: B lists of chunks to read instead of searching.
            memory_groups: B values; a row meets only chunks of its group (see :meth:`retrieve`).
            document_mask: (B,) bool; a False row counts in no loss.
            num_items_in_batch: labels in all accumulated micro-batches, as transformers' Trainer counts them.
            return_dict: False gives the tuple of what is present.

        Returns:
            SelfRAGOutput; ``logits`` (B, T', V) over the augmented sequence.
        """
        if document_mask is not None:
            if document_mask.shape != (input_ids.shape[0],):
                raise ValueError(f"document_mask: expected ({input_ids.shape[0]},), got {list(document_mask.shape)}")
            labels = None if labels is None else torch.where(document_mask[:, None], labels, -100)
            positive_ids = None if positive_ids is None else torch.where(document_mask, positive_ids, -1)
        contrast = positive_ids is not None and use_memory and len(self.memory) > 0
        weight: Any = self.config.contrastive_weight
        query = None
        if use_memory and len(self.memory) > 0 and (retrieved is None or contrast):
            query = self.embed(
                input_ids, _query_mask(input_ids, attention_mask, labels), differentiable=contrast and weight > 0
            )
        if not use_memory:
            retrieved = [[] for _ in range(input_ids.shape[0])]
        elif retrieved is None:
            retrieved = (
                [[] for _ in range(input_ids.shape[0])]
                if query is None
                else self._drop(self.retrieve(query, groups=memory_groups))
            )
        if any(len(row) for row in retrieved):
            augmented = self.augment(input_ids, retrieved, attention_mask, labels)
        else:
            augmented = Augmented(input_ids, attention_mask, labels)  # type: ignore[arg-type]
        found = self.backbone(
            input_ids=augmented.input_ids, attention_mask=augmented.attention_mask, return_dict=True, **kwargs
        )
        loss = lm_loss = contrastive_loss = None
        if labels is not None:
            assert augmented.labels is not None
            loss = lm_loss = shifted_cross_entropy(found.logits, augmented.labels, num_items_in_batch)
        if contrast:
            assert query is not None
            assert positive_ids is not None
            contrastive_loss = self.contrastive_loss(query, positive_ids, groups=memory_groups)
            if num_items_in_batch is not None and labels is not None:
                # Beside a sum over accumulated micro-batches, this micro-batch's mean counts as its share of it.
                weight = weight * (labels != -100).sum() / num_items_in_batch
            loss = weight * contrastive_loss if loss is None else loss + weight * contrastive_loss
        if loss is not None and self.score is not None:
            loss = loss + 0.0 * self.score.weight.sum()  # a parameter without gradient stops DDP
        output = SelfRAGOutput(
            loss=loss,
            logits=found.logits,
            **{CACHE: getattr(found, CACHE, None)},
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            lm_loss=lm_loss,
            contrastive_loss=contrastive_loss,
            retrieved=[list(row) for row in retrieved] if return_retrieved else None,  # type: ignore[arg-type]
        )
        return output.to_tuple() if _wants_tuple(return_dict, self.config) else output

    def _drop(self, retrieved: Any) -> Any:
        """Memory dropout: while training, rows lose what they retrieved with the configured probability."""
        if not self.training or self.config.memory_dropout == 0:
            return retrieved
        kept = torch.rand(len(retrieved)) >= self.config.memory_dropout
        return [row if keep else [] for row, keep in zip(retrieved, kept.tolist(), strict=True)]

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
        if "backbone" in self._modules:
            self.backbone.generation_config = value

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's; adapters ask for it."""
        backbone: Any = self.backbone
        return backbone.prepare_inputs_for_generation(*args, **kwargs)

    # Saving

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Weights and configuration as ever; the store goes into ``memory/``, the tokenizer beside them."""
        self.config.text_config = None if isinstance(self.backbone, SelfRAGTransformer) else self.backbone.config
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._sync_score()
            self.memory.save(Path(save_directory) / MEMORY_FOLDER)
            self.backbone.generation_config.save_pretrained(save_directory)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load what :meth:`save_pretrained` wrote, store and tokenizer included."""
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = Path(path)
        if (folder / MEMORY_FOLDER / "store.json").exists():
            model.memory = MemoryStore.load(folder / MEMORY_FOLDER)
        if (folder / "generation_config.json").exists():
            model.backbone.generation_config = type(model.backbone.generation_config).from_pretrained(folder)
        if tokenizer is None and (folder / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer is not None:
            model.set_tokenizer(tokenizer)
        return loaded


def _fitted(config: SelfRAGConfig | None, backbone: PreTrainedModel) -> SelfRAGConfig:
    """The configuration with the backbone's own in it; ``backbone`` decides the sizes."""
    inner = backbone.config.get_text_config()
    own = isinstance(backbone, SelfRAGTransformer)
    if config is None:
        return (
            backbone.config if isinstance(backbone, SelfRAGTransformer) else SelfRAGConfig(text_config=backbone.config)
        )
    if own and config.d_model != inner.d_model:
        raise ValueError(f"config: expected d_model={inner.d_model}, as in base_model, got {config.d_model}")
    names = ("d_model", "n_heads", "n_layers", "vocab_size")
    if own:
        names += ("d_ff", "rope_theta", "norm_eps", "tie_word_embeddings")  # type: ignore[assignment]
        for name in names:
            setattr(config, name, getattr(inner, name))
    else:
        config.text_config = backbone.config
        for name, theirs in zip(
            names, ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), strict=True
        ):
            setattr(config, name, getattr(inner, theirs))
    return config


def _query_mask(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """(B, T) bool: the tokens that a row may retrieve by: without those it is to predict, where there are others."""
    if labels is None:
        return attention_mask
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    given = real & (labels == -100)
    return torch.where(given.any(1, keepdim=True), given, real)


def _int_list(tokens: Any) -> list[int]:
    return [int(t) for t in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]
