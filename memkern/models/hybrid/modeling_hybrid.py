"""Any decoder-only causal LM of transformers with an internal memory, an external one, and a learnable gate."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memkern.models._compat import CACHE, DictOutput, given_cache, init
from memkern.models._devices import check_devices
from memkern.models._losses import cross_entropy, shifted_cross_entropy
from memkern.models._positions import position_limit
from memkern.models.hybrid.configuration_hybrid import HybridTransformerConfig
from memkern.models.hybrid.external_memory import BANK_FILE, ExternalMemoryBank
from memkern.models.hybrid.hybrid_attention import INITIAL_GATE, HybridMemoryAttention, MemoryCall
from memkern.models.hybrid.internal_memory import InternalMemoryModule
from memkern.nn._init import ZeroLinear

State = dict[str, Tensor]

MEMORY_FOLDER = "external_memory"
STATE_KEY = "internal_memory"


@dataclass
class HybridOutput(DictOutput, CausalLMOutputWithPast):
    """Loss, logits (B, T, V), cache, and the memory: ``new_memory_state`` {"internal_memory": (B, L, S, S)},
    ``memory_info`` {"internal_memory": the same, detached, "external_memory_size": tokens, "retrieval_gates"}."""

    new_memory_state: dict[str, Tensor] | None = None
    memory_info: dict[str, Any] | None = None


class HybridTransformerModel(PreTrainedModel, GenerationMixin):
    """A decoder with memory attached by hooks; its own parameters keep their names under ``backbone``.

    PEFT adapters attach to the backbone; ``modules_to_save=["internal_proj", "external_proj", "fusion_gate"]`` lets the
    memory's projections learn beside them. Under FSDP2 shard the decoder blocks, then the model: its memory belongs to
    the outermost unit. ``torch.compile`` takes the layers as one graph; a scalar gate is decided before them.

    Args:
        config: a :class:`HybridTransformerConfig`.
        tokenizer: for texts in the external memory.
        base_model: a backbone with weights; ``config.text_config`` becomes its configuration. None builds a fresh one.
    """

    config: HybridTransformerConfig
    config_class = HybridTransformerConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(
        self, config: HybridTransformerConfig, tokenizer: Any = None, base_model: PreTrainedModel | None = None
    ) -> None:
        if base_model is not None:
            config.set_text_config(base_model.config)
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        if base_model is None:
            backbone = AutoModelForCausalLM.from_config(config.text_config)
        else:
            backbone = base_model
            for module in backbone.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.backbone = backbone
        self.external_memory = ExternalMemoryBank(config, self, tokenizer)
        blocks = _blocks(backbone)
        retrieving = set(config.get_retrieval_layers())
        self.memory_layers = nn.ModuleDict()
        for index in range(len(blocks)):
            if config.use_internal_memory or index in retrieving:
                bank = self.external_memory if index in retrieving else None
                self.memory_layers[str(index)] = HybridMemoryAttention(config, index, bank)
        self._attach(blocks)
        self._state: Tensor | None = None
        self._frozen_caches: dict[str, Any] | None = None
        self.post_init()

    def _attach(self, blocks: Sequence[nn.Module]) -> None:
        """Hook every memory layer to its block's attention module."""
        for name, memory in self.memory_layers.items():
            block = blocks[int(name)]
            attention = _attention(block)
            # Past nn.Module's own bookkeeping: it is registered once, under this model.
            block.__dict__["hybrid_attn"] = memory
            # Bound methods, which deepcopy takes along.
            attention.register_forward_pre_hook(memory.before, with_kwargs=True)  # type: ignore[arg-type]
            attention.register_forward_hook(memory.after, with_kwargs=True)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            module.draw(init)
            return
        if isinstance(module, InternalMemoryModule):
            init.eye_(module.initial_memory)
        elif isinstance(module, HybridMemoryAttention):
            if module.gate_input is not None:
                init.constant_(module.g_retrieve, INITIAL_GATE)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def get_decoder(self, *_: Any) -> nn.Module:
        decoder: nn.Module = self.backbone.get_decoder()
        return decoder

    def is_memory_parameter(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the memory, for optimiser groups."""
        return "memory_layers." in name

    def is_initial_memory(self, name: str) -> bool:
        """Whether it is a learned initial memory or a gate, which take no weight decay."""
        return name.endswith(("initial_memory", "g_retrieve"))

    # State

    def initial_state(self, batch: int) -> Tensor | None:
        """(B, L, S, S) learned initial memory; None without an internal memory."""
        if not self.config.use_internal_memory:
            return None
        parts = [layer.internal.initial_memory for layer in self.memory_layers.values()]  # type: ignore[union-attr]
        return torch.stack(parts)[None].expand(batch, -1, -1, -1)  # type: ignore[arg-type]

    def get_memory_state(self) -> State | None:
        """The state that was set, else the learned initial memory (without a batch axis); a copy."""
        state = self._state if self._state is not None else self.initial_state(1)
        if state is None:
            return None
        return {STATE_KEY: (state if self._state is not None else state[0]).detach().clone()}

    def set_memory_state(self, state: State | Tensor | None) -> None:
        """What calls without ``memory_state`` start from until :meth:`reset_memory`; without a batch axis, all rows."""
        self._state = None if state is None else self._checked(state).detach().clone()

    def reset_memory(self) -> None:
        """Back to the learned initial memory; forget what gates kept."""
        self._state = None
        self.reset_gates()

    @staticmethod
    def detach(state: State) -> State:
        """The state without its graph."""
        return {name: tensor.detach() for name, tensor in state.items()}

    def _checked(self, state: State | Tensor) -> Tensor:
        """The (B, L, S, S) or (L, S, S) tensor of a state.

        Raises:
            ValueError: no such key, other sizes, or no internal memory to put it in.
        """
        if not self.config.use_internal_memory:
            raise ValueError("memory_state: this model has no internal memory")
        if not isinstance(state, Tensor):
            if STATE_KEY not in state:
                raise ValueError(f"memory_state: expected a dict with {STATE_KEY!r}, got {sorted(state)}")
            state = state[STATE_KEY]
        slots = self.config.memory_slots
        expected = (len(self.memory_layers), slots, slots)
        if state.dim() not in (3, 4) or state.shape[-3:] != expected:
            raise ValueError(f"memory_state: expected (B, {', '.join(map(str, expected))}), got {list(state.shape)}")
        return state

    def _incoming(self, state: State | Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        if state is None and self._state is None:
            return self.initial_state(batch)
        found = self._checked(self._state if state is None else state)  # type: ignore[arg-type]
        if found.dim() == 3:
            found = found[None].expand(batch, -1, -1, -1)
        if found.shape[0] != batch:
            raise ValueError(f"memory_state: expected {batch} rows, as input_ids has, got {found.shape[0]}")
        return found.to(device)

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        memory_state: State | Tensor | None = None,
        document_ids: Tensor | None = None,
        document_mask: Tensor | None = None,
        use_external_memory: bool = True,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        targets: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> HybridOutput | tuple[Any, ...]:
        """(B, T) tokens to next-token logits, through both memories.

        Every token reads the internal memory that the call came with; the memory for the next call is computed from all
        unmasked tokens. So no token is seen by an earlier one, and decoding token by token equals one long call.

        Args:
            input_ids: (B, T) int64; or ``inputs_embeds`` (B, T, D).
            labels: (B, T) int64, shifted here; -100 ignored.
            attention_mask: (B, past + T) bool or 0/1.
            memory_state: {"internal_memory": (B, L, S, S)} or without B; None takes the one that was set, else the
                learned initial memory.
            document_ids: (B,) int64: rows retrieve only chunks of their document, and keep gated contexts apart.
            document_mask: (B,) bool: a False row keeps its state bit for bit and counts in no loss.
            use_external_memory: False leaves the bank alone.
            targets: (B, T) int64, not shifted.
            return_dict: False gives (logits, loss, memory_info).

        Returns:
            HybridOutput.
        """
        past = given_cache(past_key_values, cache)
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        if labels is not None and targets is not None:
            raise ValueError("targets: expected either labels or targets, got both")
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        check_devices(
            self.backbone,
            name,
            given,
            labels=labels,
            targets=targets,
            attention_mask=attention_mask,
            document_ids=document_ids,
            document_mask=document_mask,
        )
        call = self._call(given, attention_mask, memory_state, document_ids, document_mask, use_external_memory, past)
        if self._frozen_caches is not None and (past is None or past.get_seq_length() == 0):
            # Generation without a key-value cache starts over at each token: so do the gates' contexts.
            for name, kept in self._frozen_caches.items():
                self.memory_layers[name].cache.restore(kept)  # type: ignore[union-attr, operator]
        asked = {
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            CACHE: past,
        }
        found = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            memory_call=call,
            **{name: value for name, value in asked.items() if value is not None},
            **kwargs,
        )
        loss = self._loss(found.logits, labels, targets, document_mask, num_items_in_batch)
        state = None
        if call.memory is not None:
            layers = [call.new_memory[int(name)] for name in self.memory_layers]
            state = {STATE_KEY: torch.stack(layers, 1)}
        info = {
            STATE_KEY: None if state is None else state[STATE_KEY].detach(),
            "external_memory_size": self.external_memory.get_size(),
            "retrieval_gates": None if self.training else self.gate_values(),
        }
        if not (self.config.return_dict if return_dict is None else return_dict):
            return found.logits, loss, info
        return HybridOutput(
            loss=loss,
            logits=found.logits,
            **{CACHE: getattr(found, CACHE, None)},
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            new_memory_state=state,
            memory_info=info,
        )

    def _call(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        memory_state: State | Tensor | None,
        document_ids: Tensor | None,
        document_mask: Tensor | None,
        external: bool,
        past: Any = None,
    ) -> MemoryCall:
        batch, length = given.shape[:2]
        for name, value in (("document_ids", document_ids), ("document_mask", document_mask)):
            if value is not None and value.shape != (batch,):
                raise ValueError(f"{name}: expected ({batch},), got {list(value.shape)}")
        seen = 0 if past is None else past.get_seq_length()
        # A cache of fixed size counts on the device, which is not asked; what generates with it builds it to fit.
        total = length + seen if isinstance(seen, int) else length
        limit = position_limit(self.backbone, total)
        if limit is not None:
            raise ValueError(f"input_ids: expected at most {limit} tokens, the backbone's positions, got {total}")
        if document_ids is not None:
            if document_ids.is_floating_point():
                raise ValueError(f"document_ids: expected integers, got {document_ids.dtype}")
            document_ids = document_ids.to(torch.int64)
        mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -length:].bool()
        memory = self._incoming(memory_state, batch, given.device) if self.config.use_internal_memory else None
        if memory_state is not None and memory is None:
            self._checked(memory_state)
        rows = document_ids if document_ids is not None else self._anonymous(batch, given.device)
        searching = external and self.external_memory.is_ready()
        layers = self.memory_layers.items() if searching else ()
        opened = frozenset(int(name) for name, layer in layers if layer.is_open())  # type: ignore[operator, union-attr]
        return MemoryCall(memory, mask, document_mask, document_ids, rows, external, opened)

    def _anonymous(self, batch: int, device: torch.device) -> Tensor:
        """(B,) numbers for rows without a document, the same tensor from call to call.

        Batches of another size are other documents; no number is one that a caller would give.
        """
        kept = self.__dict__.get("_anonymous_rows")
        if kept is None or kept.numel() != batch or kept.device != device:
            first = torch.iinfo(torch.int64).min + batch * (batch - 1) // 2
            kept = torch.arange(first, first + batch, device=device)
            self.__dict__["_anonymous_rows"] = kept
        found: Tensor = kept
        return found

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        targets: Tensor | None,
        document_mask: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor | None:
        wanted = labels if labels is not None else targets
        if wanted is None:
            return None
        if document_mask is not None:
            wanted = torch.where(document_mask[:, None], wanted, -100)
        loss_of = shifted_cross_entropy if labels is not None else cross_entropy
        loss = loss_of(logits, wanted, num_items_in_batch)
        if self.training and torch.is_grad_enabled():
            # Branches that this call skipped give zero gradients, not none: DDP waits for every parameter.
            for parameter in self.memory_layers.parameters():
                if parameter.requires_grad:
                    loss = loss + 0.0 * parameter.sum()
        return loss

    def gate_values(self) -> dict[int, float]:
        """sigmoid of each layer's retrieval gate."""
        return {
            int(name): layer.gate_value()  # type: ignore[operator, union-attr, misc]
            for name, layer in self.memory_layers.items()
            if layer.gate_input is not None  # type: ignore[union-attr]
        }

    # External memory

    def use_bank(self, bank: ExternalMemoryBank) -> None:
        """Put another bank of the same sizes in place of the external memory."""
        self.external_memory = bank
        for layer in self.memory_layers.values():
            if layer.bank is not None:  # type: ignore[union-attr]
                layer.bank = bank  # type: ignore[assignment]
        self.reset_gates()

    def reset_gates(self) -> None:
        """Forget what gates kept for their documents."""
        for layer in self.memory_layers.values():
            layer.cache.clear()  # type: ignore[operator, union-attr]

    @torch.no_grad()
    def write_external_memory(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[list[int]]:
        """Run the backbone over (B, T) tokens and store its attention states, each row by itself.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1; padding is not stored.
            document_ids: (B,) int64, or None: chunks that only calls without ids find.

        Returns:
            The slots of each row's chunks.
        """
        if not self.config.use_external_memory:
            raise ValueError("use_external_memory: this model has no external memory")
        check_devices(self.backbone, "input_ids", input_ids, attention_mask=attention_mask, document_ids=document_ids)
        call = self._call(input_ids, attention_mask, None, document_ids, None, False)
        call.capture = {}
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, "memory_call": call}
            if attention_mask is not None:
                arguments["attention_mask"] = attention_mask.to(torch.int64)
                if "position_ids" in inspect.signature(self.backbone.forward).parameters:
                    # Counted over the text's own tokens, wherever its padding stands.
                    arguments["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            self.backbone(**arguments)
        finally:
            for module in training:
                module.training = True
        states = torch.stack([call.capture[layer] for layer in self.external_memory.layers])
        documents = [None] * len(input_ids) if document_ids is None else document_ids.tolist()
        slots = []
        for row, document in enumerate(documents):
            kept = slice(None) if attention_mask is None else attention_mask[row].bool()
            slots.append(self.external_memory.write(states[:, row, kept], document))
        return slots

    # Generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory_state: State | Tensor | None = None,
        document_ids: Tensor | None = None,
        use_external_memory: bool = True,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` through both memories; every step reads the state that generation started with.

        Args:
            memory_state, document_ids, use_external_memory: as in :meth:`forward`.
        """
        given = next(x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        if self.config.use_internal_memory:
            # A tensor with a batch axis, which beams and several returned sequences repeat.
            kwargs["memory_state"] = self._incoming(memory_state, given.shape[0], given.device)
        elif memory_state is not None:
            self._checked(memory_state)
        if document_ids is not None:
            kwargs["document_ids"] = document_ids
        self._frozen_caches = {
            name: layer.cache.snapshot()  # type: ignore[union-attr, operator]
            for name, layer in self.memory_layers.items()
        }
        try:
            return super().generate(inputs, *args, use_external_memory=use_external_memory, **kwargs)  # type: ignore[misc]
        finally:
            self._frozen_caches = None

    # Saving

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Weights and configuration as ever; what the external memory holds goes into ``external_memory/``."""
        self.config.retrieval_threshold = self.external_memory.get_threshold()
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory) / MEMORY_FOLDER
        # An empty bank too, where it follows one that was not.
        if self.external_memory.is_ready() or (folder / BANK_FILE).exists():
            self.external_memory.save(folder)
        if self.external_memory.tokenizer is not None:
            self.external_memory.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a checkpoint of ours with its bank and tokenizer, or a bare backbone's, which gets fresh memories."""
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = Path(path)
        if (folder / MEMORY_FOLDER / BANK_FILE).exists():
            model.external_memory.load(folder / MEMORY_FOLDER, model.device)
        if model.external_memory.tokenizer is None and (folder / "tokenizer_config.json").exists():
            model.external_memory.tokenizer = AutoTokenizer.from_pretrained(folder)
        return loaded


def _blocks(backbone: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks: the first list of as many modules as the model has layers."""
    decoder: Any = backbone.get_decoder()  # type: ignore[operator]
    count = backbone.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"base_model: {type(backbone).__name__} has no list of {count} decoder blocks")


def _attention(block: nn.Module) -> nn.Module:
    """A block's self-attention module."""
    for name in ("self_attn", "attn", "attention", "self_attention"):
        found = getattr(block, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"base_model: {type(block).__name__} has no attention module that is known by its name")
