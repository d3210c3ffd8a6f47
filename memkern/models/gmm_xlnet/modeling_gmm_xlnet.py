"""XLNet for question answering with a gated mixture of memory experts that passes from segment to segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkern.models._xlnet import tokens
from memkern.models._xlnet.model import MemoryXLNet, SegmentResult, init
from memkern.models._xlnet.outputs import MemoryQAOutput
from memkern.models.gmm_xlnet.configuration_gmm_xlnet import GMMXLNetConfig
from memkern.nn.fusion import MemoryFusion
from memkern.nn.gating import MemoryGatingNetwork
from memkern.nn.mixture import GatedMemoryMixture
from memkern.nn.reader import AggregatedMemoryReader
from memkern.nn.updater import ExpertUpdater


class GMMXLNetForQA(MemoryXLNet):
    """XLNet with k memory experts, routed by what a segment writes.

    Per segment: the experts' weighted sum enters at the read tokens' input embeddings; the states at the write tokens
    are routed and update the experts; the sum of the updated experts is fused into all token states before the head.
    The weights are the routing that the state carries from the segment before ("write-based"), or those of a router on
    the segment's own embeddings ("read-based").

    Args:
        base_model: an ``XLNetForQuestionAnsweringSimple`` or ``XLNetModel``, whose parameters are shared, or a config.
        num_experts, memory_slots, routing_mode: see :class:`GMMXLNetConfig`.
        **memory_options: the other memory fields of :class:`GMMXLNetConfig`.

    Raises:
        ValueError: an option out of range or unknown, named.
        TypeError: an unknown option, or a base model of another kind.
    """

    config_class = GMMXLNetConfig
    initial_memories = ("memory_mixture.",)

    def __init__(
        self,
        base_model: Any,
        num_experts: int | None = None,
        memory_slots: int | None = None,
        routing_mode: str | None = None,
        **memory_options: Any,
    ) -> None:
        given = {"num_experts": num_experts, "memory_slots": memory_slots, "routing_mode": routing_mode}
        memory_options.update({name: value for name, value in given.items() if value is not None})
        self._build(base_model, memory_options)
        config, width = self.config, self.config.d_model
        if self.memory_type == "gmm":
            experts, most, backend = config.num_experts, config.max_experts, config.memory_backend
            self.memory_mixture = GatedMemoryMixture(
                experts, config.memory_slots, width, config.init_strategies, max_experts=most
            )
            self.gating_network = MemoryGatingNetwork(
                width, experts, config.routing_temperature, config.pooling_method, most, backend=backend
            )
            self.expert_updater = ExpertUpdater(width, experts, most, backend=backend)
            # The read router looks at the mean of the embeddings, whatever the write router pools by.
            self.memory_reader = AggregatedMemoryReader(
                width, experts, config.routing_mode, config.routing_temperature, "mean", most, backend=backend
            )
            self.memory_write_embeddings = nn.Parameter(torch.empty(config.memory_slots, width))
            if self._reads_at_head:
                self.memory_fusion = MemoryFusion(width, config.n_head)
        self._finish(base_model)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GMMXLNetForQA) and hasattr(module, "memory_write_embeddings"):
            init.normal_(module.memory_write_embeddings, mean=0.0, std=self.config.initializer_range)

    @property
    def num_experts(self) -> int:
        """k."""
        count: int = self.config.num_experts
        return count

    @property
    def memory_slots(self) -> int:
        """S, slots of an expert, and read and write tokens of a segment."""
        count: int = self.config.memory_slots
        return count

    @property
    def _needs_write_tokens(self) -> bool:
        return True

    def _token_count(self, name: str) -> int:
        return self.memory_slots

    def get_initial_memory(self, batch_size: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """{"expert_0".. (B, S, D), "routing_probs" (B, k) of 1/k}; {} with the memory off."""
        if self.memory_type == "standard":
            return {}
        device = self.device if device is None else device
        state = {
            f"expert_{index}": expert.to(device).expand(batch_size, -1, -1).clone()
            for index, expert in enumerate(self.memory_mixture.get_all_experts())
        }
        state["routing_probs"] = self._uniform(batch_size, state["expert_0"])
        return state

    def _unbatched_initial(self) -> dict[str, Tensor]:
        if self.memory_type == "standard":
            return {}
        experts = self.memory_mixture.get_all_experts()
        return {f"expert_{index}": expert.detach().clone() for index, expert in enumerate(experts)}

    def reset_memory(self) -> None:
        """Forget the state that was set, on the model or on ``memory_mixture``."""
        super().reset_memory()
        if self.memory_type == "gmm":
            self.memory_mixture.reset_experts()

    def _uniform(self, batch: int, like: Tensor) -> Tensor:
        return like.new_full((batch, self.num_experts), 1.0 / self.num_experts)

    def _check_state(self, state: Any, batch: int) -> dict[str, Tensor]:
        if not isinstance(state, dict):
            raise ValueError(f"memory_state: expected a dict of experts, got {type(state).__name__}")
        if self.memory_type == "standard":
            return state
        names = [f"expert_{index}" for index in range(self.num_experts)]
        given = [name for name in state if name.startswith("expert_")]
        if len(given) != self.num_experts:
            raise ValueError(f"memory_state must contain {self.num_experts} experts, got {len(given)}")
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"memory_state: missing {', '.join(missing)}; the keys are expert_0 to {names[-1]}")
        expected = (self.memory_slots, self.config.d_model)
        checked = {name: _rows(name, state[name], expected, batch) for name in names}
        probs = state.get("routing_probs")
        if probs is None:
            checked["routing_probs"] = self._uniform(batch, checked["expert_0"])
        else:
            checked["routing_probs"] = _rows("routing_probs", probs, (self.num_experts,), batch)
        return checked

    def _memory_segment(
        self,
        segment: tokens.Segment,
        state: Any,
        rows: Tensor | None,
        cls_index: Tensor | None,
        options: dict[str, Any],
    ) -> SegmentResult:
        reader = self.memory_reader
        experts = torch.stack([state[f"expert_{index}"] for index in range(self.num_experts)], 1)
        read_probs = state["routing_probs"]
        if reader.read_gating_network is not None:
            read_probs = reader.compute_read_routing(segment.embeddings, segment.text_mask())
        if self._reads_at_input:
            read = reader.aggregate(experts, read_probs)
        else:
            read = torch.zeros_like(experts[:, 0])
        encoded = self._encode(segment, read, self.memory_write_embeddings, options)
        hiddens = encoded.last_hidden_state
        written = tokens.write_states(segment, hiddens, self.memory_slots, self.config.memory_backend)
        routing = self.gating_network.route(written, row_mask=rows)
        updated = self.expert_updater.update(experts, written, routing.probs, row_mask=rows)
        probs = routing.probs.to(state["routing_probs"].dtype)
        if rows is not None:
            probs = torch.where(rows[:, None], probs, state["routing_probs"])
        text = tokens.text_states(segment, hiddens)
        if self._reads_at_head:
            weights = probs if reader.read_gating_network is None else read_probs
            text = self.memory_fusion(text, reader.aggregate(updated, weights))
        start, end = self._answer(text)
        new_state = {f"expert_{index}": expert for index, expert in enumerate(updated.unbind(1))}
        new_state["routing_probs"] = probs
        info = None
        if options["return_routing_info"]:
            counted = routing.probs if rows is None else torch.where(rows[:, None], routing.probs, 0.0)
            info = {
                "routing_probs": routing.probs,
                "routing_logits": routing.logits,
                "routing_entropy": routing.entropy,
                "expert_activations": counted.sum(0),
            }
        return SegmentResult(
            start,
            end,
            new_state,
            load_balance=routing.load_balance_loss,
            entropy=routing.entropy,
            routing_info=info,
            encoder=self._encoder_outputs(segment, encoded),
        )

    def auxiliary_loss(self, output: MemoryQAOutput) -> Tensor | float:
        """load_balance_weight * load_balance_loss + entropy_regularization_weight * entropy_loss."""
        balance, entropy = output.load_balance_loss, output.entropy_loss
        if balance is None or entropy is None:
            return 0.0
        loss: Tensor | float = 0.0
        if self.config.load_balance_weight:
            loss = loss + self.config.load_balance_weight * balance
        if self.config.entropy_regularization_weight:
            loss = loss + self.config.entropy_regularization_weight * entropy
        return loss


def _rows(name: str, value: Tensor, expected: tuple[int, ...], batch: int) -> Tensor:
    """``value`` as (batch, *expected); without a batch axis it counts for every row."""
    if tuple(value.shape) == expected:
        return value.expand(batch, *expected)
    if tuple(value.shape) != (batch, *expected):
        raise ValueError(f"memory_state[{name!r}]: expected shape {(batch, *expected)}, got {tuple(value.shape)}")
    return value
