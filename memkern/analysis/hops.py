"""Follow a multi-hop question through memory: which slots each hop read, which entities link the segments."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memkern.analysis.figures import Array, as_array, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPITALISED = re.compile(r"[A-Z][\w'-]*(?:\s+[A-Z][\w'-]*)*")


def extract_simple_entities(text: str, min_length: int = 3) -> list[str]:
    """Runs of capitalised words of at least ``min_length`` characters, each once, in their order."""
    found = (match.group() for match in _CAPITALISED.finditer(text))
    return list(dict.fromkeys(run for run in found if len(run) >= min_length))


def attention_confidence(read_weights: Array) -> float:
    """How focused reads are: the mean over rows of 1 - H / ln N, each row (..., N) scaled to sum 1; 1 for one slot.

    Rows without any weight count as not focused at all.
    """
    weights = as_array("read_weights", read_weights)
    slots = weights.shape[-1]
    if slots < 2:
        return 1.0
    rows = np.clip(weights.reshape(-1, slots), 0, None)
    total = rows.sum(-1, keepdims=True)
    shares = np.where(total > 0, rows / np.where(total > 0, total, 1), 1 / slots)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)
    return float((1 - entropy / math.log(slots)).mean())


@dataclass(frozen=True)
class HopInfo:
    """One recorded hop; arrays are empty where the tracker does not keep them."""

    hop_number: int
    question_focus: str
    memory_read_weights: np.ndarray[Any, Any]  # (B, H, N)
    memory_write_weights: np.ndarray[Any, Any]  # (B, H, N)
    extracted_info: str
    confidence: float


@dataclass(frozen=True)
class ReasoningChain:
    """All hops of a question with its answer."""

    question: str
    answer: str
    hops: list[HopInfo]
    bridge_entities: list[str]
    total_confidence: float
    success: bool


@dataclass(frozen=True)
class BridgeEntity:
    """An entity that several segments name."""

    text: str
    segments: list[int]
    attention_scores: dict[int, float]
    is_answer: bool = False

    @property
    def hop_count(self) -> int:
        """How many segments it joins."""
        return len(self.segments)

    @property
    def avg_attention(self) -> float:
        """Mean attention over its segments."""
        scores = self.attention_scores.values()
        return sum(scores) / len(scores) if scores else 0.0


@dataclass(frozen=True)
class ReasoningHop:
    """A step from one segment to a later one over an entity that both name."""

    from_segment: int
    to_segment: int
    bridging_entity: str | None = None
    attention_flow: float = 0.0
    confidence: float = 0.0


class HopTracker:
    """Records hops and segments. Two interfaces, which may be used side by side.

    By memory reads: :meth:`record_hop` for each hop, then :meth:`get_reasoning_chain`. By segments:
    :meth:`track_segment` for each, :meth:`mark_answer`, then :meth:`detect_bridge_entities`, :meth:`detect_hops`,
    :meth:`get_hop_sequence`.

    Args:
        track_attention, track_content: keep the weights, and the memory, of every hop.
        min_attention_threshold: attention below which an entity is no bridge and a step no hop. A number as the first
            argument is this one too.
    """

    def __init__(
        self,
        track_attention: bool | float = True,
        track_content: bool = True,
        *,
        min_attention_threshold: float = 0.1,
    ) -> None:
        if not isinstance(track_attention, bool):
            min_attention_threshold, track_attention = float(track_attention), True
        if not 0 <= min_attention_threshold <= 1:
            raise ValueError(f"min_attention_threshold: expected 0 to 1, got {min_attention_threshold}")
        self.track_attention, self.track_content = track_attention, track_content
        self.min_attention_threshold = min_attention_threshold
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        self.current_chain: list[HopInfo] = []
        self.memory_history: list[np.ndarray[Any, Any]] = []
        self.segment_attention: dict[int, np.ndarray[Any, Any]] = {}
        self.entity_attention: dict[str, dict[int, float]] = {}
        self.answer_entities: set[str] = set()
        self.answer_segment: int | None = None

    @property
    def hop_count(self) -> int:
        """How many hops were recorded."""
        return len(self.current_chain)

    def record_hop(
        self, memory_info: Mapping[str, Any], question_part: str | None = None, extracted_info: str | None = None
    ) -> HopInfo:
        """Record one hop from a model's ``memory_info``: ``read_weights`` (B, H, N) and what else is there.

        Raises:
            ValueError: no read weights, or of a wrong rank.
        """
        if memory_info.get("read_weights") is None:
            raise ValueError(f"memory_info: expected the key 'read_weights', got {sorted(memory_info)}")
        reads = as_array("read_weights", memory_info["read_weights"], 1, 2, 3)
        writes = memory_info.get("write_weights")
        nothing = np.zeros((0,))
        hop = HopInfo(
            hop_number=self.hop_count + 1,
            question_focus=question_part or f"hop {self.hop_count + 1}",
            memory_read_weights=reads if self.track_attention else nothing,
            memory_write_weights=(
                as_array("write_weights", writes, 1, 2, 3) if self.track_attention and writes is not None else nothing
            ),
            extracted_info=extracted_info or "",
            confidence=attention_confidence(reads),
        )
        self.current_chain.append(hop)
        if self.track_content and memory_info.get("memory_state") is not None:
            self.memory_history.append(as_array("memory_state", memory_info["memory_state"], 2, 3))
        return hop

    def get_reasoning_chain(
        self, question: str, answer: str, bridge_entities: Iterable[str] | None = None
    ) -> ReasoningChain:
        """The hops so far: confidence is their mean, success an answer with a confidence above 0.5."""
        hops = self.current_chain
        total = sum(hop.confidence for hop in hops) / len(hops) if hops else 0.0
        return ReasoningChain(
            question=question,
            answer=answer,
            hops=list(hops),
            bridge_entities=list(bridge_entities or ()),
            total_confidence=total,
            success=bool(answer.strip()) and total > 0.5,
        )

    def visualize_attention_flow(self, save_path: str | Path | None = None) -> Figure:
        """Which slots each hop read and wrote, one row a hop; written to ``save_path`` where one is given.

        Raises:
            ValueError: no hop with its attention was recorded. ImportError: no matplotlib.
        """
        kept = [hop for hop in self.current_chain if hop.memory_read_weights.size]
        if not kept:
            raise ValueError("current_chain: expected at least one hop with attention, got none")
        figure = new_figure((10, 2 + 0.5 * len(kept)))
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for axes, name in zip(panels, ("read", "write"), strict=True):
            weights = [getattr(hop, f"memory_{name}_weights") for hop in kept]
            slots = kept[0].memory_read_weights.shape[-1]
            rows = [w.reshape(-1, slots).mean(0) if w.size else np.zeros(slots) for w in weights]
            figure.colorbar(axes.imshow(np.stack(rows), aspect="auto", cmap="viridis"), ax=axes)
            axes.set_yticks(range(len(kept)), [f"{hop.hop_number}: {hop.question_focus[:30]}" for hop in kept])
            axes.set(xlabel="memory slot", title=f"{name} weights")
        if save_path is not None:
            save_figure(figure, save_path)
        return figure

    def track_segment(
        self,
        segment_idx: int,
        attention_weights: Array,
        entities: Sequence[str] | Mapping[str, Sequence[int]] = (),
        segment_text: str | None = None,
    ) -> None:
        """Record a segment: attention (heads, T) or (T,), and the entities that it names (any case).

        An entity's attention is the mean of the whole segment's; where ``entities`` maps names to the tokens they
        stand at, the mean over those. Without entities those of ``segment_text`` are taken.
        """
        weights = as_array("attention_weights", attention_weights, 1, 2)
        tokens = weights.mean(0) if weights.ndim == 2 else weights
        mean = float(tokens.mean()) if tokens.size else 0.0
        self.segment_attention[segment_idx] = tokens
        for name in entities or extract_simple_entities(segment_text or ""):
            at = list(entities[name]) if isinstance(entities, Mapping) else []
            found = self.entity_attention.setdefault(name.lower(), {})
            found[segment_idx] = float(tokens[at].mean()) if at else mean

    def mark_answer(self, answer_text: str, answer_segment: int) -> None:
        """The answer, and the segment that it was found in.

        Raises:
            ValueError: the segment was not tracked.
        """
        if answer_segment not in self.segment_attention:
            raise ValueError(
                f"answer_segment: expected one of {sorted(self.segment_attention)}, got {answer_segment!r}"
            )
        self.answer_entities, self.answer_segment = set(answer_text.lower().split()), answer_segment

    def detect_bridge_entities(self, min_segments: int = 2, min_attention: float | None = None) -> list[BridgeEntity]:
        """Entities that at least ``min_segments`` segments name, those of most segments first.

        ``min_attention`` is the least mean attention, the tracker's threshold by default.
        """
        least = self.min_attention_threshold if min_attention is None else min_attention
        bridges = [
            BridgeEntity(name, sorted(scores), dict(scores), any(word in name for word in self.answer_entities))
            for name, scores in self.entity_attention.items()
            if len(scores) >= min_segments
        ]
        return sorted((b for b in bridges if b.avg_attention >= least), key=lambda b: b.hop_count, reverse=True)

    def detect_hops(self, attention_threshold: float | None = None) -> list[ReasoningHop]:
        """Steps between neighbouring segments of a bridge whose mean attention reaches the threshold."""
        least = self.min_attention_threshold if attention_threshold is None else attention_threshold
        hops = []
        for bridge in self.detect_bridge_entities():
            for start, end in itertools.pairwise(bridge.segments):
                flow = (bridge.attention_scores[start] + bridge.attention_scores[end]) / 2
                if flow >= least:
                    hops.append(ReasoningHop(start, end, bridge.text, flow, min(1.0, 2 * flow)))
        return hops

    def get_hop_sequence(self, to_answer: bool = True) -> list[ReasoningHop]:
        """The steps from segment 0 to the answer's segment, always the most confident from where one has been.

        Without a marked answer, or with ``to_answer=False``, all steps by their first segment.
        """
        hops = sorted(self.detect_hops(), key=lambda hop: hop.from_segment)
        if not to_answer or self.answer_segment is None:
            return hops
        reached = {0}
        path: list[ReasoningHop] = []
        while self.answer_segment not in reached:
            onward = [hop for hop in hops if hop.from_segment in reached and hop.to_segment not in reached]
            if not onward:
                break
            path.append(max(onward, key=lambda hop: hop.confidence))
            reached.add(path[-1].to_segment)
        return path

    def get_statistics(self) -> dict[str, Any]:
        """Counts and means over what was recorded."""
        hops = self.detect_hops()
        lengths = [hop.to_segment - hop.from_segment for hop in hops]
        chain = self.current_chain
        return {
            "num_segments": len(self.segment_attention),
            "num_entities": len(self.entity_attention),
            "num_bridge_entities": len(self.detect_bridge_entities()),
            "num_hops": len(hops),
            "avg_hop_length": sum(lengths) / len(lengths) if lengths else 0.0,
            "max_hop_chain": _longest_chain(hops),
            "num_recorded_hops": len(chain),
            "mean_read_confidence": sum(hop.confidence for hop in chain) / len(chain) if chain else 0.0,
            "has_answer": self.answer_segment is not None,
            "answer_segment": self.answer_segment,
        }

    def export_analysis(self, output_path: str | Path) -> Path:
        """Write everything except arrays as JSON."""
        recorded = ("hop_number", "question_focus", "extracted_info", "confidence")
        content = {
            "statistics": self.get_statistics(),
            "bridge_entities": [
                {
                    "text": bridge.text,
                    "segments": bridge.segments,
                    "hop_count": bridge.hop_count,
                    "avg_attention": bridge.avg_attention,
                    "is_answer": bridge.is_answer,
                }
                for bridge in self.detect_bridge_entities()
            ],
            "all_hops": [asdict(hop) for hop in self.detect_hops()],
            "hop_sequence_to_answer": [asdict(hop) for hop in self.get_hop_sequence()],
            "recorded_hops": [{name: getattr(hop, name) for name in recorded} for hop in self.current_chain],
        }
        path = Path(output_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def _longest_chain(hops: Sequence[ReasoningHop]) -> int:
    """Most hops that follow one another; a hop always leads to a later segment."""
    longest: dict[int, int] = {}
    for hop in sorted(hops, key=lambda hop: hop.from_segment):
        longest[hop.to_segment] = max(longest.get(hop.to_segment, 0), longest.get(hop.from_segment, 0) + 1)
    return max(longest.values(), default=0)
