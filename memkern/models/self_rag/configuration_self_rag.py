"""Configuration of the Self-RAG models and of the small transformer beneath them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

RETRIEVAL_METHODS = ("cosine", "dot", "learned")
POOLINGS = ("mean", "last", "first", "cls")

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "d_model": 192,
        "n_heads": 4,
        "n_layers": 4,
        "d_ff": 384,
        "vocab_size": 4096,
        "max_seq_len": 256,
        "max_chunks": 1000,
        "chunk_size": 32,
        "chunk_overlap": 8,
        "top_k": 3,
    },
    "small": {
        "d_model": 384,
        "n_heads": 6,
        "n_layers": 8,
        "d_ff": 1024,
        "vocab_size": 16000,
        "max_seq_len": 512,
        "max_chunks": 5000,
        "chunk_size": 48,
        "chunk_overlap": 12,
        "top_k": 5,
    },
    "medium": {},
    "large": {
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 16,
        "d_ff": 3072,
        "vocab_size": 32000,
        "max_seq_len": 2048,
        "max_chunks": 20000,
        "chunk_size": 64,
        "chunk_overlap": 16,
        "top_k": 7,
    },
}


class SelfRAGConfig(PreTrainedConfig):
    """Sizes of the transformer, of the store, and how the two work together.

    Args:
        d_model, n_heads, n_layers, d_ff, vocab_size, max_seq_len: the transformer; ``d_model`` is also the width of the
            store's embeddings. For a foreign backbone they are read from ``text_config``.
        max_chunks: chunks that the store holds; the oldest makes room.
        chunk_size, chunk_overlap: tokens in a chunk, and how many neighbours share.
        top_k: chunks retrieved for a query.
        retrieval_method: ``"cosine"``, ``"dot"`` or ``"learned"`` (a bilinear score, the identity at first).
        embed_pooling: ``"mean"``, ``"last"``, or ``"cls"`` (also ``"first"``): the first token.
        normalize_embeddings: embeddings have unit length.
        memory_token, sep_token: the marks before each chunk and after the last; a tokenizer without them gets them.
        memory_token_id, sep_token_id: their ids, for models without a tokenizer; by default the last two of the
            vocabulary.
        memory_dropout: share of the training rows that go without their retrieved chunks.
        contrastive_weight: factor of the InfoNCE loss.
        contrastive_temperature: its temperature.
        contrastive_candidates: chunks that a query is contrasted with, at most; the hardest are kept.
        dropout, attention_dropout: of the transformer.
        init_std: standard deviation of the initial weights.
        rope_theta, norm_eps: base of the rotary angles; epsilon of the norms.
        text_config: configuration of a foreign causal LM; None for the transformer of this package.
        memory_backend: backend of the operators; None chooses.

    Raises:
        ValueError: a value out of its range, named.
    """

    model_type = "memkern_self_rag"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "retrieved", "contrastive_loss"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "initializer_range": "init_std",
        # transformers takes a configuration's "top_k" for a setting of the sampler.
        "top_k": "retrieved_chunks",
    }

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        n_layers: int = 12,
        d_ff: int = 2048,
        vocab_size: int = 32000,
        max_seq_len: int = 1024,
        max_chunks: int = 10000,
        chunk_size: int = 64,
        chunk_overlap: int = 16,
        top_k: int = 5,
        retrieval_method: str = "cosine",
        embed_pooling: str = "mean",
        normalize_embeddings: bool = True,
        memory_token: str = "[MEM]",
        sep_token: str = "[SEP]",
        memory_token_id: int | None = None,
        sep_token_id: int | None = None,
        memory_dropout: float = 0.1,
        contrastive_weight: float = 0.1,
        contrastive_temperature: float = 0.05,
        contrastive_candidates: int = 128,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_std: float = 0.02,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        memory_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            values = dict(text_config)
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        if text_config is not None:
            inner = text_config.get_text_config()
            d_model, n_heads, n_layers = inner.hidden_size, inner.num_attention_heads, inner.num_hidden_layers
            vocab_size = inner.vocab_size
        self.text_config = text_config
        self.d_model, self.n_heads, self.n_layers, self.d_ff = d_model, n_heads, n_layers, d_ff
        self.vocab_size, self.max_seq_len, self.max_chunks = vocab_size, max_seq_len, max_chunks
        self.chunk_size, self.chunk_overlap = chunk_size, chunk_overlap
        self.top_k = kwargs.pop("retrieved_chunks", top_k)
        self.retrieval_method, self.embed_pooling = retrieval_method, embed_pooling
        self.normalize_embeddings = normalize_embeddings
        self.memory_token, self.sep_token = memory_token, sep_token
        self.memory_token_id, self.sep_token_id = memory_token_id, sep_token_id
        self.memory_dropout, self.contrastive_weight = memory_dropout, contrastive_weight
        self.contrastive_temperature = contrastive_temperature
        self.contrastive_candidates = contrastive_candidates
        self.dropout, self.attention_dropout, self.init_std = dropout, attention_dropout, init_std
        self.rope_theta, self.norm_eps = rope_theta, norm_eps
        self.use_cache, self.memory_backend = use_cache, memory_backend
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check()
        kwargs.pop("memory_type", None)
        version = kwargs.pop("memory_format_version", 1)
        if version > 1:
            raise ValueError(f"memory_format_version: this release reads 1, the checkpoint has {version}")
        self.memory_type, self.memory_format_version = "self_rag", 1
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]

    def _check(self) -> None:
        sizes = ("d_model", "n_heads", "n_layers", "d_ff", "vocab_size", "max_chunks", "chunk_size", "top_k")
        for name in (*sizes, "contrastive_candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if not isinstance(self.max_seq_len, int) or self.max_seq_len < 4:
            raise ValueError(f"max_seq_len: expected at least 4, got {self.max_seq_len!r}")
        if self.text_config is None and (self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2):
            raise ValueError(
                f"n_heads: expected heads of an even width that divide d_model={self.d_model}, got {self.n_heads}"
            )
        if not 0 <= self.chunk_overlap < self.chunk_size:
            raise ValueError(
                f"chunk_overlap: expected 0 <= chunk_overlap < chunk_size={self.chunk_size}, got {self.chunk_overlap}"
            )
        for name, known in (("retrieval_method", RETRIEVAL_METHODS), ("embed_pooling", POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("memory_dropout", "dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.contrastive_weight < 0:
            raise ValueError(f"contrastive_weight: expected at least 0, got {self.contrastive_weight}")
        if self.contrastive_temperature <= 0:
            raise ValueError(f"contrastive_temperature: expected above 0, got {self.contrastive_temperature}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a configuration of ours, or from a bare backbone's, which becomes the ``text_config``."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"text_config": dict(config_dict)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> SelfRAGConfig:
        """The configuration named ``"tiny"``, ``"small"``, ``"medium"`` or ``"large"``, with ``changes``."""
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def to_yaml(self, path: str | Path) -> None:
        """Write every field that differs from transformers' own defaults as YAML."""
        import yaml  # type: ignore[import-untyped]

        values = self.to_diff_dict()
        values["top_k"] = values.pop("retrieved_chunks")
        Path(path).write_text(yaml.safe_dump(values, sort_keys=True))

    @classmethod
    def from_yaml(cls, path: str | Path) -> SelfRAGConfig:
        """Read what :meth:`to_yaml` wrote, or any mapping of field names to values, ``preset`` among them."""
        import yaml  # type: ignore[import-untyped]

        values = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of field names to values")
        for generated in ("model_type", "transformers_version"):
            values.pop(generated, None)
        preset = values.pop("preset", None)
        return cls.from_preset(preset, **values) if preset is not None else cls(**values)

    def _get_generation_parameters(self) -> dict[str, Any]:
        """``top_k`` is the number of chunks here, not a setting of the sampler."""
        found = super()._get_generation_parameters()
        return {name: value for name, value in found.items() if name != "top_k"}


__all__ = ["PRESETS", "SelfRAGConfig"]
