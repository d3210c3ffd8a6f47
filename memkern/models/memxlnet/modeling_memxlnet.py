"""XLNet for question answering with token memory or differentiable memory that passes from segment to segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkern.models._xlnet import tokens
from memkern.models._xlnet.model import MemoryXLNet, SegmentResult, init
from memkern.models.memxlnet.configuration_memxlnet import MemXLNetConfig
from memkern.nn._init import KeepLinear
from memkern.nn.controller import MemoryController, temporal_links
from memkern.nn.fusion import MemoryFusion
from memkern.nn.state import map_state
from memkern.ops.expert_update import update_experts
from memkern.ops.memory import MemoryState, initial_memory_state, read_memory


class MemXLNetForQA(MemoryXLNet):
    """XLNet with one bank of memory tokens, or with a differentiable memory.

    Token memory, per segment: the m incoming vectors enter at the read tokens' input embeddings; the states at the
    write tokens update them by a gate (M' = g u + (1 - g) M); the updated bank is fused into all token states before
    the head. Differentiable memory: the incoming reads enter at the read tokens, the CLS state drives one step of the
    memory, and its reads are fused before the head.

    Args:
        base_model: an ``XLNetForQuestionAnsweringSimple`` or ``XLNetModel``, whose parameters are shared, or a config.
        mem_token_count: m.
        **memory_options: the memory fields of :class:`MemXLNetConfig`.

    Raises:
        ValueError: an option out of range or unknown, named.
        TypeError: an unknown option, or a base model of another kind.
    """

    config_class = MemXLNetConfig
    initial_memories = ("learned_memory",)

    def __init__(self, base_model: Any, mem_token_count: int | None = None, **memory_options: Any) -> None:
        if mem_token_count is not None:
            memory_options["mem_token_count"] = mem_token_count
        self._build(base_model, memory_options)
        config, width = self.config, self.config.d_model
        if self.memory_type == "token":
            count = config.mem_token_count
            # What is replaced before it was ever read would be a dead parameter.
            unread = config.memory_update == "replace" and not self._reads_at_input
            if config.memory_init == "learned" and not unread:
                self.learned_memory = nn.Parameter(torch.empty(count, width))
            if config.memory_update == "gated":
                self.memory_gate = KeepLinear(2 * width, width)
                self.memory_update_net = nn.Linear(2 * width, width)
            if self._needs_write_tokens:
                self.memory_write_embeddings = nn.Parameter(torch.empty(count, width))
        elif self.memory_type == "differentiable":
            self.memory_controller = MemoryController(
                width,
                config.resolved_memory_slots,
                width,
                config.num_memory_heads,
                use_temporal_links=config.enable_temporal_links,
                use_usage_tracking=config.enable_usage_tracking,
                sharpness=config.memory_sharpness,
                use_output=self._reads_at_head,
                backend=config.memory_backend,
            )
        if self.memory_type != "standard" and self._reads_at_head:
            self.memory_fusion = MemoryFusion(width, config.n_head)
        self._finish(base_model)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemXLNetForQA):
            if hasattr(module, "learned_memory"):
                init.normal_(module.learned_memory, mean=0.0, std=0.02)
            if hasattr(module, "memory_write_embeddings"):
                init.normal_(module.memory_write_embeddings, mean=0.0, std=self.config.initializer_range)

    @property
    def mem_token_count(self) -> int:
        """m, read and write tokens of a segment."""
        count: int = self.config.mem_token_count
        return count

    @property
    def _needs_write_tokens(self) -> bool:
        return self.memory_type == "token" and self.config.memory_update != "none"

    def _read_count(self) -> int:
        """Read tokens of a segment: m, or one per head of a differentiable memory without memory tokens."""
        if self.memory_type == "differentiable" and not self.config.mem_token_count:
            return int(self.config.num_memory_heads)
        return self.mem_token_count

    def _token_count(self, name: str) -> int:
        return self._read_count() if name == "mem_read_ids" else self.mem_token_count

    def get_initial_memory(self, batch_size: int, device: torch.device | str | None = None) -> Any:
        """(B, m, D) learned or zeros (B, 0, D with the memory off), or an empty :class:`MemoryState`."""
        device = self.device if device is None else device
        if self.memory_type == "differentiable":
            return self.memory_controller.initial_state(batch_size, device)
        if hasattr(self, "learned_memory"):
            return self.learned_memory.to(device).expand(batch_size, -1, -1).clone()
        return torch.zeros(batch_size, self.mem_token_count, self.config.d_model, device=device, dtype=self.dtype)

    def _unbatched_initial(self) -> Any:
        if self.memory_type == "differentiable":
            # What was set on the controller itself keeps its batch.
            memory = self.memory_controller.get_memory_state()
            if memory.dim() == 3:
                return self.memory_controller.initial_state(memory.shape[0])
        return map_state(lambda tensor: tensor[0].detach().clone(), self.get_initial_memory(1))

    def reset_memory(self) -> None:
        """Forget the state that was set, on the model or on ``memory_controller``."""
        super().reset_memory()
        if self.memory_type == "differentiable":
            self.memory_controller.reset_memory()

    def _check_state(self, state: Any, batch: int) -> Any:
        if self.memory_type == "differentiable":
            return self._check_memory_state(state, batch)
        expected = (self.mem_token_count, self.config.d_model)
        if not isinstance(state, Tensor):
            raise ValueError(f"memory_state: expected a tensor (B, {expected[0]}, {expected[1]}), got {_kind(state)}")
        if state.dim() == 2 and tuple(state.shape) == expected:
            return state.expand(batch, -1, -1)
        if tuple(state.shape) != (batch, *expected):
            raise ValueError(f"memory_state: expected shape {(batch, *expected)}, got {tuple(state.shape)}")
        return state

    def _check_memory_state(self, state: Any, batch: int) -> MemoryState:
        slots, width, heads = self.config.resolved_memory_slots, self.config.d_model, self.config.num_memory_heads
        if isinstance(state, Tensor):
            if tuple(state.shape) not in ((slots, width), (batch, slots, width)):
                raise ValueError(f"memory_state: expected shape {(batch, slots, width)}, got {tuple(state.shape)}")
            return initial_memory_state(batch, slots, width, heads, heads, memory=state)
        if not isinstance(state, MemoryState):
            raise ValueError(f"memory_state: expected a MemoryState or a tensor (B, N, W), got {_kind(state)}")
        if state.memory.dim() == 2:
            state = MemoryState(*(field.expand(batch, *field.shape) for field in state))
        shapes = MemoryState(
            memory=(batch, slots, width),  # type: ignore[arg-type]
            usage=(batch, slots),  # type: ignore[arg-type]
            links=(batch, heads, slots, slots),  # type: ignore[arg-type]
            precedence=(batch, heads, slots),  # type: ignore[arg-type]
            read_weights=(batch, heads, slots),  # type: ignore[arg-type]
            write_weights=(batch, heads, slots),  # type: ignore[arg-type]
        )
        for name, given, expected in zip(MemoryState._fields, state, shapes, strict=True):
            if tuple(given.shape) != expected:
                raise ValueError(f"memory_state.{name}: expected shape {expected}, got {tuple(given.shape)}")
        return state

    def _memory_segment(
        self,
        segment: tokens.Segment,
        state: Any,
        rows: Tensor | None,
        cls_index: Tensor | None,
        options: dict[str, Any],
    ) -> SegmentResult:
        if self.memory_type == "differentiable":
            return self._differentiable_segment(segment, state, rows, cls_index, options)
        read = state if self._reads_at_input else torch.zeros_like(state)
        write = self.memory_write_embeddings if self._needs_write_tokens else None
        encoded = self._encode(segment, read, write, options)
        hiddens = encoded.last_hidden_state
        new_state = self._update(segment, hiddens, state, rows)
        text = tokens.text_states(segment, hiddens)
        if self._reads_at_head:
            text = self.memory_fusion(text, new_state)
        start, end = self._answer(text)
        return SegmentResult(start, end, new_state, encoder=self._encoder_outputs(segment, encoded))

    def _update(self, segment: tokens.Segment, hiddens: Tensor, state: Tensor, rows: Tensor | None) -> Tensor:
        if not self._needs_write_tokens:
            return state
        backend = self.config.memory_backend
        written = tokens.write_states(segment, hiddens, self.mem_token_count, backend)
        if self.config.memory_update == "replace":
            written = written.to(state.dtype)
            return written if rows is None else torch.where(rows[:, None, None], written, state)
        gate, update = self.memory_gate, self.memory_update_net
        updated = update_experts(
            state[:, None],
            written,
            state.new_ones(state.shape[0], 1),
            gate.weight[None],
            gate.bias[None],
            update.weight[None],
            update.bias[None],
            row_mask=rows,
            backend=backend,
        )
        return updated[:, 0]

    def _differentiable_segment(
        self,
        segment: tokens.Segment,
        state: MemoryState,
        rows: Tensor | None,
        cls_index: Tensor | None,
        options: dict[str, Any],
    ) -> SegmentResult:
        if self._reads_at_input:
            reads = read_memory(state.memory, state.read_weights, backend=self.config.memory_backend)
            read = _spread(reads, self._read_count())
        else:
            embeddings = segment.embeddings
            read = embeddings.new_zeros(embeddings.shape[0], self._read_count(), embeddings.shape[2])
        encoded = self._encode(segment, read, None, options)
        hiddens = encoded.last_hidden_state
        x = self._cls_state(segment, hiddens, cls_index)
        out, info = self.memory_controller(x, state, step_mask=rows)
        text = tokens.text_states(segment, hiddens)
        if self._reads_at_head:
            text = self.memory_fusion(text, out[:, None])
        start, end = self._answer(text)
        new_state = info["state"]
        shown = {
            "read_weights": new_state.read_weights,
            "write_weights": new_state.write_weights,
            "usage": new_state.usage,
            "temporal_links": temporal_links(new_state),
            "memory_state": new_state.memory,
        }
        return SegmentResult(
            start,
            end,
            new_state,
            memory_info={name: value.detach().clone() for name, value in shown.items()},
            encoder=self._encoder_outputs(segment, encoded),
        )

    def _cls_state(self, segment: tokens.Segment, hiddens: Tensor, cls_index: Tensor | None) -> Tensor:
        """(B, D): the state at the CLS token: as given, else by its id, else the last token that takes part."""
        length = segment.embeddings.shape[1]
        if cls_index is None:
            candidates = segment.text_mask()
            if self.config.cls_token_id is not None and segment.input_ids is not None:
                marked = (segment.input_ids == self.config.cls_token_id) & candidates
                candidates = torch.where(marked.any(1, keepdim=True), marked, candidates)
            order = torch.arange(1, length + 1, device=hiddens.device)
            cls_index = ((candidates * order).amax(1) - 1).clamp(min=0)
        return hiddens.gather(1, cls_index.view(-1, 1, 1).expand(-1, 1, hiddens.shape[2])).squeeze(1)


def _spread(reads: Tensor, count: int) -> Tensor:
    """Reads of R heads (B, R, W) on ``count`` tokens: head i mod R at token i; on fewer tokens their means."""
    heads = reads.shape[1]
    if count == heads:
        return reads
    if count > heads:
        return reads[:, torch.arange(count, device=reads.device) % heads]
    groups = torch.arange(heads, device=reads.device) % count
    share = (groups == torch.arange(count, device=reads.device)[:, None]).to(reads.dtype)
    return (share / share.sum(1, keepdim=True)) @ reads


def _kind(value: Any) -> str:
    return type(value).__name__
