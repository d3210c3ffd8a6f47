"""The part of the XLNet models that no kind of memory changes: segments, documents, heads, losses, state."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, XLNetConfig, XLNetForQuestionAnsweringSimple, XLNetModel
from transformers.models.xlnet.modeling_xlnet import XLNetPreTrainedModel

from memkern.models._xlnet import loading, tokens
from memkern.models._xlnet.backbone import MemXLNetModel, attention_choice
from memkern.models._xlnet.config import backbone_fields
from memkern.models._xlnet.outputs import MemoryQAOutput
from memkern.nn.state import copy_state, detach_state, load_state, map_state, save_state, select_rows

try:  # skips what a checkpoint has loaded already
    init: Any = importlib.import_module("transformers.initialization")
except ImportError:  # 5.0
    init = nn.init


_ACTIVATIONS = "expert_activations"


@dataclass
class SegmentResult:
    """One segment through the encoder, the memory and the head."""

    start_logits: Tensor
    end_logits: Tensor
    state: Any
    load_balance: Tensor | None = None
    """() over the rows that count."""
    entropy: Tensor | None = None
    """(B,) routing entropy."""
    memory_info: dict[str, Tensor] | None = None
    routing_info: dict[str, Tensor] | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    """mems, hidden_states, attentions."""


class MemoryXLNet(XLNetPreTrainedModel):
    """XLNet for extractive question answering with a memory that passes from segment to segment.

    A subclass names its modules and implements the ``_memory_*`` methods. The backbone's parameters keep the names of
    ``XLNetForQuestionAnsweringSimple``.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: Any = ["MemXLNetLayer"]  # noqa: RUF012 - the type transformers gives it
    config_class: Any
    accepts_loss_kwargs = False
    initial_memories: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the parameters that are learned initial memory."""

    config: Any

    def _build(self, base_model: Any, options: dict[str, Any]) -> None:
        """Take the config, the encoder and the head from what the constructor got."""
        config, base = self._resolve(base_model, options)
        super().__init__(config)
        self._set_memory: Any = None
        if base is None:
            self.transformer = MemXLNetModel(config)
            self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
            return
        encoder = base if isinstance(base, XLNetModel) else base.transformer
        with torch.device("meta"):
            self.transformer = MemXLNetModel(config)
        # The parameters themselves move in, so that wrapping a model neither copies nor changes it.
        self.transformer.load_state_dict(encoder.state_dict(keep_vars=True), assign=True)
        if isinstance(base, XLNetModel):
            self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        else:
            self.qa_outputs = base.qa_outputs
        adopted = [self.transformer] if isinstance(base, XLNetModel) else [self.transformer, self.qa_outputs]
        for part in adopted:
            module: Any
            for module in part.modules():
                module._is_hf_initialized = True  # else post_init would draw the base model's weights anew

    def _finish(self, base_model: Any) -> None:
        """Initialise what is new, and put it where the base model is."""
        self.post_init()
        if isinstance(base_model, PreTrainedModel):
            nn.Module.to(self, device=base_model.device, dtype=base_model.dtype)
            self.train(base_model.training)

    @classmethod
    def _resolve(cls, base_model: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        given = {cls.config_class.aliases.get(name, name): value for name, value in options.items()}
        unknown = sorted(set(given) - set(cls.config_class.memory_fields))
        if unknown:
            raise TypeError(f"{cls.__name__}: unknown arguments {', '.join(unknown)}")
        if isinstance(base_model, cls.config_class):
            return (loading.with_fields(base_model, given) if given else base_model), None
        if isinstance(base_model, XLNetConfig):
            return cls.config_class(**backbone_fields(base_model.to_dict()), **given), None
        if isinstance(base_model, (XLNetForQuestionAnsweringSimple, XLNetModel, MemoryXLNet)):
            config = cls.config_class(**backbone_fields(base_model.config.to_dict()), **given)
            config._attn_implementation = base_model.config._attn_implementation
            return config, base_model
        raise TypeError(
            f"{cls.__name__}: expected an XLNetForQuestionAnsweringSimple, an XLNetModel or a config, "
            f"got {type(base_model).__name__}"
        )

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """ "eager" unless "sdpa" is asked for: the default has to equal transformers bit for bit."""
        return attention_choice(requested_attention)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        draw: Any = getattr(module, "draw", None)
        if draw is not None:
            draw(init)

    @property
    def memory_type(self) -> str:
        """ "standard" (memory off), "token", "differentiable" or "gmm"."""
        kind: str = self.config.memory_type
        return kind

    @property
    def _reads_at_input(self) -> bool:
        return self.config.read_injection in ("input", "both")

    @property
    def _reads_at_head(self) -> bool:
        return self.config.read_injection in ("head", "both")

    def is_memory_parameter(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the memory or its routing, and not to the backbone."""
        return not name.startswith(("transformer.", "qa_outputs."))

    def is_initial_memory(self, name: str) -> bool:
        """Whether the parameter of this name is learned initial memory, which takes no weight decay."""
        return name.startswith(self.initial_memories) if self.initial_memories else False

    def memory_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters of the memory."""
        return ((name, p) for name, p in self.named_parameters() if self.is_memory_parameter(name))

    @abstractmethod
    def _check_state(self, state: Any, batch: int) -> Any:
        """The state in the model's own form for ``batch`` rows; a ValueError says what does not fit."""

    @abstractmethod
    def get_initial_memory(self, batch_size: int, device: torch.device | str | None = None) -> Any:
        """The learned initial memory for ``batch_size`` rows, with a graph to its parameters and memory of its own."""

    @abstractmethod
    def _memory_segment(
        self,
        segment: tokens.Segment,
        state: Any,
        rows: Tensor | None,
        cls_index: Tensor | None,
        options: dict[str, Any],
    ) -> SegmentResult:
        """Read, encode, write, read again, answer."""

    def _token_ids(self, given: Any, name: str, device: torch.device) -> Tensor | None:
        ids = given if given is not None else getattr(self.config, name)
        return None if ids is None else tokens.slot_ids(name, ids, self._token_count(name), device)

    @property
    @abstractmethod
    def _needs_write_tokens(self) -> bool:
        """Whether this memory is written from the states at write tokens."""

    @abstractmethod
    def _token_count(self, name: str) -> int:
        """How many ids ``mem_read_ids`` or ``mem_write_ids`` name."""

    def get_memory_state(self) -> Any:
        """A copy of the state that was set, else the learned initial memory without a batch axis."""
        if self._set_memory is not None:
            return copy_state(self._set_memory)
        return self._unbatched_initial()

    @abstractmethod
    def _unbatched_initial(self) -> Any: ...

    def set_memory_state(self, state: Any) -> None:
        """Keep a copy of ``state``, batched or for every row, as what calls without a state start from.

        Raises:
            ValueError: the state does not fit this model.
        """
        self._check_state(state, _batch_of(state))
        self._set_memory = copy_state(state)

    def reset_memory(self) -> None:
        """Forget the state that was set: documents start from the learned initial memory again."""
        self._set_memory = None

    @staticmethod
    def detach(state: Any) -> Any:
        """The state without its graph."""
        return detach_state(state)

    @staticmethod
    def select_rows(state: Any, index: Tensor) -> Any:
        """Some rows of a batched state."""
        return select_rows(state, index)

    def save_memory_state(self, path: str | Path, state: Any = None) -> None:
        """Write a state, by default :meth:`get_memory_state`, to a safetensors file."""
        save_state(self.get_memory_state() if state is None else state, path)

    def load_memory_state(self, path: str | Path) -> Any:
        """Read a state that was saved, for ``memory_state=`` or :meth:`set_memory_state`.

        Raises:
            ValueError: the file holds no state, or one that does not fit this model.
        """
        state = load_state(path, self.device)
        self._check_state(state, _batch_of(state))
        return state

    def _start_state(self, memory_state: Any, batch: int, device: torch.device) -> Any:
        if memory_state is None:
            memory_state = self._set_memory
        if memory_state is None:
            return self.get_initial_memory(batch, device)
        return self._check_state(map_state(lambda tensor: tensor.to(device), memory_state), batch)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load this model from its own checkpoints, plain XLNet, or the earlier file layouts.

        Keywords that name a memory field override the checkpoint's; one that chooses the memory type converts a
        checkpoint of another type: what is missing is initialised, and a warning lists it.

        Raises:
            ValueError: the checkpoint holds another type of memory and no keyword asks for a conversion; the message
                names both.
        """
        return loading.load(cls, pretrained_model_name_or_path, args, config, kwargs)

    @classmethod
    def _load_with_config(cls, path: Any, args: tuple[Any, ...], config: Any, kwargs: dict[str, Any]) -> Any:
        """transformers' own loading with a config that is settled."""
        return super().from_pretrained(path, *args, config=config, **kwargs)

    def load_overlapping(self, other: nn.Module) -> list[str]:
        """Copy into the memory's parameters what another model's hold of the same name, as far as both reach.

        The rule for a change of heads, slots or experts: heads, slots and experts that both have are copied, what is
        new keeps its initial value.

        Returns:
            names that were not filled, or only in part.
        """
        return loading.copy_overlap(self, other)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        memory_state: Any = None,
        mem_read_ids: Sequence[int] | Tensor | None = None,
        mem_write_ids: Sequence[int] | Tensor | None = None,
        document_mask: Tensor | None = None,
        cls_index: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_mask: Tensor | None = None,
        mems: Any = None,
        use_mems: bool | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_routing_info: bool = False,
    ) -> Any:
        """A segment of each document, or whole documents segment by segment.

        Args:
            input_ids: (B, T) int64; (B, N, T) runs N segments, and the state's graph is cut every
                ``config.bptt_segments`` of them.
            attention_mask: (B, T), 1 for tokens that take part.
            token_type_ids: (B, T) int64.
            start_positions, end_positions: (B,) int64; the index T (or beyond) is ignored.
            memory_state: what the segment before returned as ``new_memory_state``. None starts from the state that was
                set, else from the learned initial memory. A state without a batch axis counts for every row.
            mem_read_ids, mem_write_ids: ids of the memory tokens that the inputs carry. None, here and in the config,
                adds them behind the text.
            document_mask: (B,) bool; a False row keeps its state bit for bit and counts in no loss.
            cls_index: (B,) int64, position of the CLS token, for the differentiable memory.
            inputs_embeds: (B, T, D) in place of ``input_ids``.
            mems, use_mems, perm_mask, target_mapping: XLNet's own, with the memory off.
            return_routing_info: GMM: add ``routing_info``.

        Returns:
            :class:`MemoryQAOutput`, or its tuple with ``return_dict=False``. Logits have the width T of the inputs.

        Raises:
            ValueError: a state of another batch, count or shape, wrong or missing memory tokens; named.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if attention_mask is None and input_mask is not None:
            attention_mask = 1.0 - input_mask.float()
        first = input_ids if input_ids is not None else inputs_embeds
        if first is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        options: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_routing_info": return_routing_info,
            "mem_read_ids": mem_read_ids,
            "mem_write_ids": mem_write_ids,
        }
        native: dict[str, Any] = {
            "mems": mems,
            "use_mems": use_mems,
            "perm_mask": perm_mask,
            "target_mapping": target_mapping,
        }
        whole = first.dim() == (3 if input_ids is not None else 4)
        columns = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "cls_index": cls_index,
            "rows": document_mask,
        }
        if document_mask is not None:
            expected = tuple(first.shape[:2]) if whole else (first.shape[0],)
            if document_mask.dtype != torch.bool:
                raise TypeError(f"document_mask: expected a bool mask, got {document_mask.dtype}")
            if tuple(document_mask.shape) != expected:
                raise ValueError(f"document_mask: expected shape {expected}, got {tuple(document_mask.shape)}")
        state = self._start_state(memory_state, first.shape[0], first.device)
        if not whole:
            results = [self._segment(columns, state, options, native)]
        else:
            results = []
            for index in range(first.shape[1]):
                if index and self.config.bptt_segments and index % self.config.bptt_segments == 0:
                    state = detach_state(state)
                column = {name: None if value is None else value[:, index] for name, value in columns.items()}
                results.append(self._segment(column, state, options, native))
                state = results[-1].state
        output = self._output(results, whole, document_mask, start_positions, end_positions)
        return output if return_dict else output.to_tuple()

    def _segment(
        self, columns: dict[str, Tensor | None], state: Any, options: dict[str, Any], native: dict[str, Any]
    ) -> SegmentResult:
        if self.memory_type == "standard":
            return self._plain_segment(columns, state, options, native)
        for name in ("perm_mask", "target_mapping"):
            if native[name] is not None:
                raise ValueError(f"{name} is for pretraining, and cannot be combined with memory")
        input_ids, embeddings = columns["input_ids"], columns["inputs_embeds"]
        mask = columns["attention_mask"]
        rows = columns["rows"]
        reads, writes = None, None
        if input_ids is not None:
            reads = self._token_ids(options["mem_read_ids"], "mem_read_ids", input_ids.device)
            writes = self._token_ids(options["mem_write_ids"], "mem_write_ids", input_ids.device)
            if self._needs_write_tokens and (reads is None) != (writes is None):
                missing = "mem_read_ids" if reads is None else "mem_write_ids"
                raise ValueError(f"{missing}: expected beside the other memory tokens' ids, got None")
            if self.config.strict_memory_tokens:
                for name, ids in (("mem_read_ids", reads), ("mem_write_ids", writes)):
                    if ids is not None:
                        tokens.check_present(name, input_ids, ids, rows)
        elif options["mem_read_ids"] is not None or options["mem_write_ids"] is not None:
            raise ValueError(
                "mem_read_ids and mem_write_ids name tokens of input_ids, and there are only inputs_embeds"
            )
        segment = tokens.Segment(torch.empty(0), mask, columns["token_type_ids"], input_ids, reads, writes)
        if embeddings is None:
            assert input_ids is not None
            memory = segment.memory_positions()
            # What stands at a memory token is replaced, so its id need not be in the vocabulary.
            looked_up = input_ids if memory is None else input_ids.masked_fill(memory, 0)
            embeddings = self.transformer.word_embedding(looked_up)
        segment.embeddings = embeddings
        if mask is not None:
            segment.attention_mask = mask.to(embeddings.dtype)
        return self._memory_segment(segment, state, rows, columns["cls_index"], options)

    def _plain_segment(
        self, columns: dict[str, Tensor | None], state: Any, options: dict[str, Any], native: dict[str, Any]
    ) -> SegmentResult:
        """The base model, operation by operation."""
        mask = columns["attention_mask"]
        encoded = self.transformer(
            columns["input_ids"],
            attention_mask=mask if mask is None or mask.dtype != torch.bool else mask.float(),
            token_type_ids=columns["token_type_ids"],
            inputs_embeds=columns["inputs_embeds"],
            output_attentions=options["output_attentions"],
            output_hidden_states=options["output_hidden_states"],
            return_dict=True,
            **native,
        )
        start, end = self._answer(encoded.last_hidden_state)
        kept = {"mems": encoded.mems, "hidden_states": encoded.hidden_states, "attentions": encoded.attentions}
        # Asked for and not there: nothing was routed.
        info: dict[str, Tensor] | None = {} if options["return_routing_info"] else None
        return SegmentResult(start, end, state, routing_info=info, encoder=kept)

    def _encode(self, segment: tokens.Segment, read: Tensor, write: Tensor | None, options: dict[str, Any]) -> Any:
        """The encoder over text and memory tokens."""
        inputs = tokens.place(segment, read, write, self.config.memory_backend)
        return self.transformer(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            token_type_ids=inputs.token_type_ids,
            use_mems=False,
            output_attentions=options["output_attentions"],
            output_hidden_states=options["output_hidden_states"],
            return_dict=True,
        )

    def _answer(self, hiddens: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.qa_outputs(hiddens).split(1, dim=-1)
        return start.squeeze(-1).contiguous(), end.squeeze(-1).contiguous()

    def _encoder_outputs(self, segment: tokens.Segment, encoded: Any) -> dict[str, Any]:
        hidden = encoded.hidden_states
        if hidden is not None:
            hidden = tuple(tokens.text_states(segment, layer) for layer in hidden)
        return {"mems": None, "hidden_states": hidden, "attentions": encoded.attentions}

    def _output(
        self,
        results: list[SegmentResult],
        whole: bool,
        document_mask: Tensor | None,
        start_positions: Tensor | None,
        end_positions: Tensor | None,
    ) -> MemoryQAOutput:
        last = results[-1]
        start = torch.stack([r.start_logits for r in results], 1) if whole else last.start_logits
        end = torch.stack([r.end_logits for r in results], 1) if whole else last.end_logits
        balance, entropy, loss = None, None, None
        if last.load_balance is not None:
            masks = [None] if document_mask is None else document_mask.unbind(1) if whole else [document_mask]
            balance, entropy = _mean_loss(results, masks), _mean_entropy(results, masks)
        if start_positions is not None and end_positions is not None:
            loss = (
                span_cross_entropy(start, start_positions, document_mask)
                + span_cross_entropy(end, end_positions, document_mask)
            ) / 2
            loss = loss + self.auxiliary_loss(MemoryQAOutput(load_balance_loss=balance, entropy_loss=entropy))
            loss = self._tie_unused(loss)
        return MemoryQAOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            new_memory_state=last.state,
            memory_info=last.memory_info,
            routing_info=_routing_info(results) if whole else last.routing_info,
            load_balance_loss=balance,
            entropy_loss=entropy,
            **last.encoder,
        )

    def auxiliary_loss(self, output: MemoryQAOutput) -> Tensor | float:
        """The weighted sum of the auxiliary losses of ``output``; the number 0 without any."""
        return 0.0

    def _tie_unused(self, loss: Tensor) -> Tensor:
        """Under DDP every parameter has to reach the loss: what this call did not use reaches it with weight zero."""
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loss
        if torch.distributed.get_world_size() == 1:
            return loss
        rarely = [p for name, p in self.named_parameters() if self.is_memory_parameter(name)]
        rarely.append(self.transformer.mask_emb)
        layer: Any
        for layer in self.transformer.layer:
            rarely += [layer.rel_attn.seg_embed, layer.rel_attn.r_s_bias]
        # A sharded parameter (FSDP2) needs no tie, and could not enter a sum of local tensors.
        local = [p for p in rarely if p.requires_grad and not hasattr(p, "device_mesh")]
        return loss + sum(0.0 * p.flatten()[0] for p in local)


def span_cross_entropy(logits: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
    """Mean cross-entropy of (..., T) logits with positions (...) without the index T and masked rows; none gives 0."""
    length = logits.shape[-1]
    if positions.dim() == logits.dim():
        positions = positions.squeeze(-1)
    positions = positions.clamp(0, length)
    if rows is not None:
        positions = positions.masked_fill(~rows, length)
        logits = torch.where(rows[..., None], logits, 0.0)
    flat, targets = logits.float().reshape(-1, length), positions.reshape(-1)
    total = functional.cross_entropy(flat, targets, ignore_index=length, reduction="sum")
    return total / (targets != length).sum().clamp(min=1)


def _mean_loss(results: list[SegmentResult], masks: Sequence[Tensor | None]) -> Tensor:
    """The segments' load-balance losses, averaged over the segments in which a row counts."""
    losses = torch.stack([r.load_balance for r in results if r.load_balance is not None])
    if masks[0] is None:
        return losses.mean()
    counted = torch.stack([mask.any() for mask in masks if mask is not None]).to(losses.dtype)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def _mean_entropy(results: list[SegmentResult], masks: Sequence[Tensor | None]) -> Tensor:
    """Minus the mean entropy over the rows that count."""
    entropy = torch.stack([r.entropy for r in results if r.entropy is not None])
    if masks[0] is None:
        return -entropy.mean()
    counted = torch.stack([mask for mask in masks if mask is not None])
    return -torch.where(counted, entropy, 0.0).sum() / counted.sum().clamp(min=1)


def _routing_info(results: list[SegmentResult]) -> dict[str, Tensor] | None:
    """The segments' routing, stacked behind the batch; the activations of the experts summed."""
    parts = [r.routing_info for r in results if r.routing_info is not None]
    if not parts or not parts[0]:
        return results[-1].routing_info
    stacked = {name: torch.stack([part[name] for part in parts], 1) for name in parts[0] if name != _ACTIVATIONS}
    return stacked | {_ACTIVATIONS: torch.stack([part[_ACTIVATIONS] for part in parts]).sum(0)}


def _batch_of(state: Any) -> int:
    """The batch of a state, or 1 of one without a batch axis; which of the two, the check decides."""
    if isinstance(state, Tensor):
        return state.shape[0] if state.dim() == 3 else 1
    if isinstance(state, dict):
        first = next((value for name, value in state.items() if name.startswith("expert_")), None)
        return first.shape[0] if isinstance(first, Tensor) and first.dim() == 3 else 1
    memory = getattr(state, "memory", None)
    return memory.shape[0] if isinstance(memory, Tensor) else 1
