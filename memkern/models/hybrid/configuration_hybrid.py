"""Configuration of the hybrid memory transformer: a backbone's own, and what memory stands beside it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

GATE_INPUTS = ("scalar", "token")
ADAPTATIONS = ("compress", "pool", "pad", "truncate")


class HybridTransformerConfig(PreTrainedConfig):
    """Which memories a decoder gets, and where.

    Args:
        text_config: the backbone's configuration, or its dictionary; a small default Llama when None.
        use_internal_memory: a fast-weight bank in every layer.
        memory_slots: its width S; by default the hidden size / 128, at least 1.
        num_mem_heads: kept for earlier files; the bank has no heads.
        use_external_memory: retrieval from a bank of chunks in some layers.
        external_memory_size: tokens that the bank holds; the oldest chunks make room.
        external_index: ``"exact"``, or a FAISS index for very large banks: ``"faiss-flat"``, ``"faiss-hnsw"``,
            ``"faiss-ivf"`` or a FAISS factory string. It searches on the host, document by document.
        retrieval_k: tokens that a position reads, in whole chunks (at least one).
        chunk_size: tokens in a chunk.
        num_retrieval_layers: how many layers retrieve, spread evenly; by default a sixth of them, at least one.
        use_gated_retrieval: a learnable gate in each layer that retrieves.
        retrieval_threshold: a gate at or below it is closed at inference; the bank's threshold at first.
        gate_input: ``"scalar"``, one number a layer, decided on the host; or ``"token"``, which depends on the
            layer's input and is decided on the device.
        gate_scales_inference: multiply by the gate at inference as in training; False is the earlier behaviour.
        seq_adapt_method: a last chunk that is not full: ``"truncate"`` drops it; the other names keep it, short.
        memory_backend: backend of the operators; None chooses.
        bptt_segments: after how many segments training cuts the graph of the state; None for never.
        use_gpu_to_search, embedding_layer_path, max_batch_size, batch_size: kept for earlier files, without effect.
        log_freq: steps between two log lines of a gate.

    Raises:
        ValueError: a value out of its range, named.
    """

    model_type = "memkern_hybrid"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "new_memory_state", "memory_info"]

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        use_internal_memory: bool = True,
        memory_slots: int | None = None,
        num_mem_heads: int | None = None,
        use_external_memory: bool = True,
        external_memory_size: int = 1048576,
        external_index: str = "exact",
        retrieval_k: int = 8,
        chunk_size: int = 4,
        num_retrieval_layers: int | None = None,
        use_gated_retrieval: bool = False,
        retrieval_threshold: float = 0.5,
        gate_input: str = "scalar",
        gate_scales_inference: bool = True,
        seq_adapt_method: str = "compress",
        memory_backend: str | None = None,
        bptt_segments: int | None = None,
        use_gpu_to_search: bool = True,
        embedding_layer_path: str | None = None,
        max_batch_size: int = 32,
        batch_size: int | None = None,
        log_freq: int = 100,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            values = dict(text_config)
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        if text_config is None:
            text_config = LlamaConfig(
                hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=8192
            )
        self.text_config = text_config
        inner = text_config.get_text_config()
        slots = _default_slots(text_config) if memory_slots is None else memory_slots
        self.use_internal_memory, self.memory_slots = use_internal_memory, slots
        self.num_mem_heads = max(1, slots // 4) if num_mem_heads is None else num_mem_heads
        self.use_external_memory, self.external_memory_size = use_external_memory, external_memory_size
        self.external_index = external_index
        self.retrieval_k, self.chunk_size, self.num_retrieval_layers = retrieval_k, chunk_size, num_retrieval_layers
        self.use_gated_retrieval, self.retrieval_threshold = use_gated_retrieval, retrieval_threshold
        self.gate_input, self.gate_scales_inference = gate_input, gate_scales_inference
        self.seq_adapt_method, self.memory_backend, self.bptt_segments = (
            seq_adapt_method,
            memory_backend,
            bptt_segments,
        )
        self.use_gpu_to_search, self.embedding_layer_path = use_gpu_to_search, embedding_layer_path
        self.max_batch_size, self.batch_size, self.log_freq = max_batch_size, batch_size, log_freq
        self.initializer_range = initializer_range
        self._check(inner.num_hidden_layers)
        kwargs.pop("memory_type", None)
        version = kwargs.pop("memory_format_version", 1)
        if version > 1:
            raise ValueError(f"memory_format_version: this release reads 1, the checkpoint has {version}")
        self.memory_type = "hybrid" if use_internal_memory or use_external_memory else "standard"
        self.memory_format_version = 1
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(inner, name, None))
        kwargs.setdefault("tie_word_embeddings", getattr(inner, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def _check(self, layers: int) -> None:
        for name in ("memory_slots", "num_mem_heads", "external_memory_size", "retrieval_k", "chunk_size", "log_freq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        for name in ("num_retrieval_layers", "bptt_segments"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected None or an int of at least 1, got {value!r}")
        if self.external_memory_size < self.chunk_size:
            raise ValueError(
                f"external_memory_size: expected at least chunk_size={self.chunk_size}, got {self.external_memory_size}"
            )
        if not 0 <= self.retrieval_threshold <= 1:
            raise ValueError(f"retrieval_threshold: expected 0 to 1, got {self.retrieval_threshold}")
        if not isinstance(self.external_index, str) or not self.external_index:
            raise ValueError(f"external_index: expected 'exact' or an index of FAISS, got {self.external_index!r}")
        for name, known in (("gate_input", GATE_INPUTS), ("seq_adapt_method", ADAPTATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def set_text_config(self, text_config: PreTrainedConfig) -> None:
        """Take another backbone's configuration; a memory size that followed from the old one follows from the new."""
        if self.memory_slots == _default_slots(self.text_config):
            self.memory_slots = _default_slots(text_config)
        self.text_config = text_config
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
            setattr(self, name, getattr(text_config.get_text_config(), name, None))

    def get_retrieval_layers(self) -> list[int]:
        """The layers that retrieve: floor(i L / n) for i < n, or none without an external memory."""
        if not self.use_external_memory:
            return []
        layers = self.text_config.get_text_config().num_hidden_layers
        given = self.num_retrieval_layers
        count = max(1, layers // 6) if given is None else min(given, layers)
        return [i * layers // count for i in range(count)]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a configuration of ours, or from a bare backbone's, which becomes the ``text_config``."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"text_config": dict(config_dict)}
        return super().from_dict(config_dict, **kwargs)


def _default_slots(text_config: PreTrainedConfig) -> int:
    return max(1, text_config.get_text_config().hidden_size // 128)
