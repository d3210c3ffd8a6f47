"""What stands beside a layer's self-attention: internal memory, external retrieval with its gate, and their fusion."""

from __future__ import annotations

import ctypes
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memkern.models.hybrid.configuration_hybrid import HybridTransformerConfig
from memkern.models.hybrid.external_memory import ExternalMemoryBank
from memkern.models.hybrid.internal_memory import InternalMemoryModule
from memkern.models.hybrid.retrieval_cache import RetrievalCache
from memkern.nn._init import ZeroLinear
from memkern.ops import fuse_sources, retrieved_attention

logger = logging.getLogger(__name__)

SELF, INTERNAL, EXTERNAL = range(3)
INITIAL_GATE = 0.5


class MemoryCall:
    """What one call of the model hands to its layers, and what they hand back.

    No dataclass: wrappers of modules, FSDP among them, copy those on their way, and what the layers hand back is lost.

    Attributes:
        memory: (B, L, S, S), None without an internal memory.
        token_mask: (B, T) bool, the columns of this call.
        row_mask: (B,) bool, rows that are not False change their state.
        documents: (B,) int64 given by the caller.
        rows: (B,) int64 that the cache keys by: the documents, or a number for each anonymous row.
        external: whether the bank is asked.
        open: layers whose scalar gate lets this call search.
        new_memory: (B, S, S) by layer, filled by the layers.
        capture: attention outputs of the retrieving layers, when they are being written.
    """

    def __init__(
        self,
        memory: Tensor | None,
        token_mask: Tensor | None,
        row_mask: Tensor | None,
        documents: Tensor | None,
        rows: Tensor,
        external: bool,
        open: frozenset[int],
    ) -> None:
        self.memory, self.token_mask, self.row_mask = memory, token_mask, row_mask
        self.documents, self.rows, self.external, self.open = documents, rows, external, open
        self.new_memory: dict[int, Tensor] = {}
        self.capture: dict[int, Tensor] | None = None


class HybridMemoryAttention(nn.Module):
    """A + sum_i gamma_i P_i(context_i) with A the layer's own attention output.

    gamma is the softmax over the sources that are there, A's own share among them; P_i start at zero.

    Args:
        config: which sources.
        layer: index of the layer.
        bank: the external memory, None in a layer that does not retrieve.
    """

    def __init__(self, config: HybridTransformerConfig, layer: int, bank: ExternalMemoryBank | None) -> None:
        super().__init__()
        width = config.text_config.get_text_config().hidden_size
        self.layer, self.backend = layer, config.memory_backend
        self.log_freq, self.scales_inference = config.log_freq, config.gate_scales_inference
        self._bank = [bank]  # in a list: it belongs to the model, not to its layers
        self.fusion_gate = nn.Linear(width, 3)
        self.internal: InternalMemoryModule | None = None
        if config.use_internal_memory:
            self.internal = InternalMemoryModule(
                config.memory_slots, width // config.num_mem_heads, width, config.num_mem_heads
            )
            self.internal_proj = ZeroLinear(width, width, bias=False)
        self.gate_input: str | None = None
        if bank is not None:
            self.external_proj = ZeroLinear(width, width, bias=False)
            if config.use_gated_retrieval:
                self.gate_input = config.gate_input
                # One number; with an axis, since sharding refuses parameters that have none.
                self.g_retrieve = nn.Parameter(torch.tensor([INITIAL_GATE]))
                if self.gate_input == "token":
                    self.token_gate = ZeroLinear(width, 1, bias=False)
        self.cache = RetrievalCache()
        self.current: MemoryCall | None = None
        self._decision: tuple[Any, float] | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A gate that was saved as a plain number is one number all the same."""
        gate = state_dict.get(f"{prefix}g_retrieve")
        if gate is not None and gate.dim() == 0:
            state_dict[f"{prefix}g_retrieve"] = gate.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def bank(self) -> ExternalMemoryBank | None:
        return self._bank[0]

    @bank.setter
    def bank(self, bank: ExternalMemoryBank | None) -> None:
        self._bank[0] = bank

    # Hooks on the layer's attention module

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take this call's memory out of the keyword arguments: attention kernels would not know it."""
        if "memory_call" not in kwargs:
            return None
        self.current = kwargs["memory_call"]
        return args, {name: value for name, value in kwargs.items() if name != "memory_call"}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the memories to the attention output."""
        call, self.current = self.current, None
        if call is None:
            return output
        normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if isinstance(output, tuple):
            return (self(normed, output[0], call), *output[1:])
        return self(normed, output, call)

    def forward(self, normed: Tensor, attention: Tensor, call: MemoryCall) -> Tensor:
        """(B, T, D) input of the attention and its output to the output with memory."""
        sources: list[Tensor | None] = [None, None, None]
        found: Tensor | None = None  # (B, T) positions that read the bank
        if self.internal is not None and call.memory is not None:
            memory = call.memory[:, self.layer]
            context, fresh = self.internal(attention, memory, call.token_mask)
            if call.row_mask is not None:
                fresh = torch.where(call.row_mask[:, None, None], fresh, memory)
            call.new_memory[self.layer] = fresh
            sources[INTERNAL] = self.internal_proj(context)
        if self.bank is not None:
            if call.capture is not None:
                call.capture[self.layer] = attention.detach()
            elif call.external and self.bank.is_ready():
                slots = self._retrieve(normed, attention, call, self.bank)
                if slots is not None:
                    found = (slots >= 0).any(3).any(1)
                    sources[EXTERNAL] = self.external_proj(self._context(normed, attention, slots, self.bank))
        if all(source is None for source in sources):
            return attention
        # Attention enters whole and takes its share of the weights as a source of zeros, so that projections that are
        # zero leave it bit for bit.
        sources[SELF] = attention.new_zeros(()).expand_as(attention)
        shares = self.fusion_gate(normed)
        if found is not None:
            # A position that reads nothing has no such source: it would take its share of the others' weight.
            external = torch.where(found[..., None], shares[..., EXTERNAL:], -math.inf)
            shares = torch.cat((shares[..., :EXTERNAL], external), -1)
        return attention + fuse_sources(sources, shares, backend=self.backend).to(attention.dtype)

    # Retrieval

    def _retrieve(self, normed: Tensor, attention: Tensor, call: MemoryCall, bank: ExternalMemoryBank) -> Tensor | None:
        """(B, H, T, n) slots that each position reads, -1 for none; None from a closed gate that kept nothing."""
        if self.gate_input == "token":
            return self._retrieve_by_token(normed, attention, call, bank)
        if self.gate_input is None:
            return self._search(attention, call, bank)
        if self.layer in call.open:
            slots = self._search(attention, call, bank)
            self.cache.put(call.rows, self._last(slots, call), bank.epoch)
            return slots
        kept = self.cache.get(call.rows, bank.epoch) if len(self.cache) else None
        return None if kept is None else kept[:, :, None].expand(-1, -1, attention.shape[1], -1)

    def _retrieve_by_token(
        self, normed: Tensor, attention: Tensor, call: MemoryCall, bank: ExternalMemoryBank
    ) -> Tensor:
        """Every token's own gate. Closed tokens find nothing anew: they read what the open token before them found.

        Decided on the device, so the search and the attention always run; a closed token without an open one before it
        has no pair to read. That saves the memory traffic of its keys, not the launches.
        """
        slots = self._search(attention, call, bank)
        threshold = bank.get_threshold()
        if not self.training and threshold > 0:
            is_open = self._gates(normed)[..., 0] > threshold
            places = torch.arange(is_open.shape[1], device=is_open.device)
            before = torch.where(is_open, places, -1).cummax(1).values  # the last open token up to each
            carried = slots.gather(2, before.clamp(min=0)[:, None, :, None].expand_as(slots))
            kept = self.cache.get(call.rows, bank.epoch) if len(self.cache) else None
            older = -torch.ones_like(slots) if kept is None else kept[:, :, None].expand_as(slots)
            slots = torch.where((before >= 0)[:, None, :, None], carried, older)
        self.cache.put(call.rows, self._last(slots, call), bank.epoch)
        return slots

    def _gates(self, normed: Tensor) -> Tensor:
        """sigmoid of the gate: (1,) of a scalar one, (B, T, 1) of tokens' own."""
        logits = self.g_retrieve if self.gate_input == "scalar" else self.g_retrieve + self.token_gate(normed)
        return torch.sigmoid(logits.float())

    def _context(self, normed: Tensor, attention: Tensor, slots: Tensor, bank: ExternalMemoryBank) -> Tensor:
        """(B, T, D) of what the positions read, times the gate."""
        context = self._attend(attention, slots, bank)
        if self.gate_input is not None and (self.training or self.scales_inference):
            context = self._gates(normed).to(context.dtype) * context
        return context

    def _search(self, attention: Tensor, call: MemoryCall, bank: ExternalMemoryBank) -> Tensor:
        """(B, H, T, n) slots for every position."""
        rows, length, _ = attention.shape
        documents = None if call.documents is None else call.documents.repeat_interleave(length)
        found = bank.search(self.layer, attention.flatten(0, 1), documents)
        return found.view(bank.heads, rows, length, -1).transpose(0, 1)

    def _last(self, slots: Tensor, call: MemoryCall) -> Tensor:
        """(B, H, n) slots of each row's last real token."""
        if call.token_mask is None:
            return slots[:, :, -1]
        length = call.token_mask.shape[1]
        last = length - 1 - call.token_mask.int().flip(1).argmax(1)
        return slots.gather(2, last[:, None, None, None].expand(-1, slots.shape[1], 1, slots.shape[3]))[:, :, 0]

    def _attend(self, attention: Tensor, slots: Tensor, bank: ExternalMemoryBank) -> Tensor:
        """softmax(q . k / sqrt(d)) v over each position's own pairs; keys and values are one bank, never gathered."""
        rows, length, width = attention.shape
        queries = attention.view(rows, length, bank.heads, bank.head_dim).transpose(1, 2)
        bank.to(attention.device)
        keys = bank.keys(self.layer).expand(rows, -1, -1, -1)
        places, scale = bank.tokens(slots), 1 / math.sqrt(bank.head_dim)
        with torch.profiler.record_function("memkern::retrieved_attention"):
            context = retrieved_attention(queries, keys, keys, indices=places, scale=scale, backend=self.backend)
        return context.transpose(1, 2).reshape(rows, length, width)

    # Gate

    def is_open(self) -> bool:
        """Whether a call searches: decided on the host, before the layers run. True without a scalar gate."""
        if self.bank is None or self.gate_input != "scalar" or self.training:
            return True
        threshold = self.bank.get_threshold()
        # Numbers far below zero round to a gate of 0, which a threshold of 0 opens all the same.
        return threshold == 0 or self.gate_value() > threshold

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gate_value(self) -> float:
        """sigmoid(g_retrieve) as the host last saw it; it looks again only after the parameter changed.

        On a GPU a change is noticed by the parameter's version, which optimisers and loading advance; writing through
        ``.data`` there does not. Of a sharded parameter it is gathered from all ranks at each call.
        """
        parameter = self.g_retrieve
        if isinstance(parameter, DTensor):
            return float(torch.sigmoid(parameter.full_tensor().detach().double()))
        if parameter.device.type == "cpu":
            state: Any = ctypes.string_at(parameter.data_ptr(), parameter.element_size())
        else:
            state = (parameter.data_ptr(), parameter._version)
        if self._decision is None or self._decision[0] != state:
            self._decision = (state, float(torch.sigmoid(parameter.detach().double())))
        return self._decision[1]

    def log_gate_value(self, step: int) -> float | None:
        """The gate's value, None without one; every ``log_freq`` steps also a line of the logger."""
        if self.gate_input is None:
            return None
        value = self.gate_value()
        if step % self.log_freq == 0:
            logger.info("layer %d, step %d: retrieval gate %.4f", self.layer, step, value)
        return value
