"""A causal LM that retrieves from a store by its own embeddings and reads what it found before its input.

"Self-RAG" here means retrieval by the model's own embeddings. It is not the method of that name with reflection tokens
(Asai et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memkern.models._compat import CACHE, DictOutput, init
from memkern.models._devices import check_devices
from memkern.models._losses import shifted_cross_entropy
from memkern.models._positions import position_limit
from memkern.models.self_rag.augmentation import Augmented
from memkern.models.self_rag.configuration_self_rag import SelfRAGConfig
from memkern.models.self_rag.embedding_cache import EmbeddingCache
from memkern.models.self_rag.generation import Generation
from memkern.models.self_rag.modeling_transformer import SelfRAGPreTrainedModel, SelfRAGTransformer, _wants_tuple
from memkern.models.self_rag.retrieval import BilinearScore
from memkern.models.self_rag.tokens import Retrieved
from memkern.store import Hit, MemoryStore

MEMORY_FOLDER = "memory"


@dataclass
class SelfRAGOutput(DictOutput, CausalLMOutputWithPast):
    """What :meth:`SelfRAGModel.forward` returns; ``loss`` is lm_loss + contrastive_weight * contrastive_loss,
    ``logits`` (B, T', V) cover the augmented sequence."""

    lm_loss: Tensor | None = None  # ()
    contrastive_loss: Tensor | None = None  # () unweighted
    retrieved: list[list[Hit]] | None = None


class SelfRAGModel(Generation, SelfRAGPreTrainedModel):
    """Retrieval-augmented causal LM over a :class:`memkern.store.MemoryStore`.

    Under FSDP2 shard the decoder blocks, then the model; call its ``unshard()`` before writing to the memory outside of
    a forward. ``torch.compile`` makes two graphs, one on either side of the search.

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

        Raises:
            ValueError: an argument of another size, or on another device than the model. The store may be elsewhere.
        """
        check_devices(
            self.backbone,
            "input_ids",
            input_ids,
            attention_mask=attention_mask,
            labels=labels,
            positive_ids=positive_ids,
            document_mask=document_mask,
        )
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
        limit = position_limit(self.backbone, input_ids.shape[1])
        if any(len(row) for row in retrieved) or limit is not None:
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
