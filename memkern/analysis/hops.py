"""Follow a multi-hop question through memory: which slots each hop read, which entities link the segments."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """One recorded hop; arrays only where the tracker keeps them."""

    hop_number: int
    question_part: str
    extracted_info: str
    confidence: float
    attention_weights: np.ndarray[Any, Any] | None = None  # (B, H, N)
    memory_content: np.ndarray[Any, Any] | None = None  # (B, N, W)


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
class SegmentHop:
    """A step from one segment to a later one over an entity that both name."""

    from_segment: int
    to_segment: int
    entity: str
    attention_flow: float
    confidence: float


@dataclass
class _Segment:
    attention: list[float]
    entities: dict[str, float]  # entity -> attention
    is_answer: bool = False
    answer: str = ""


@dataclass
class HopTracker:
    """Records hops and segments. Two interfaces, which may be used side by side.

    By memory reads: :meth:`record_hop` for each hop, then :meth:`get_reasoning_chain`. By segments:
    :meth:`track_segment` for each, :meth:`mark_answer`, then :meth:`detect_bridge_entities`, :meth:`detect_hops`,
    :meth:`get_hop_sequence`.

    Args:
        track_attention, track_content: keep the read weights, and the memory, of every hop.
        min_attention_threshold: flow between two segments below which there is no hop. A number as the first
            argument is this one too.
    """

    track_attention: bool | float = True
    track_content: bool = True
    min_attention_threshold: float = 0.1
    hops: list[HopInfo] = field(default_factory=list, init=False)
    segments: dict[int, _Segment] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.track_attention, bool):
            self.min_attention_threshold, self.track_attention = float(self.track_attention), True
        if not 0 <= self.min_attention_threshold <= 1:
            raise ValueError(f"min_attention_threshold: expected 0 to 1, got {self.min_attention_threshold}")

    def record_hop(self, memory_info: Mapping[str, Any], question_part: str = "", extracted_info: str = "") -> HopInfo:
        """Record the read of one hop from a model's ``memory_info``: ``read_weights`` (B, H, N), ``memory_state``.

        Raises:
            ValueError: no read weights, or of a wrong rank.
        """
        if memory_info.get("read_weights") is None:
            raise ValueError(f"memory_info: expected the key 'read_weights', got {sorted(memory_info)}")
        reads = as_array("read_weights", memory_info["read_weights"], 1, 2, 3)
        content = memory_info.get("memory_state") if self.track_content else None
        hop = HopInfo(
            hop_number=len(self.hops) + 1,
            question_part=question_part,
            extracted_info=extracted_info,
            confidence=attention_confidence(reads),
            attention_weights=reads if self.track_attention else None,
            memory_content=None if content is None else as_array("memory_state", content, 2, 3),
        )
        self.hops.append(hop)
        return hop

    def get_reasoning_chain(
        self, question: str, answer: str, bridge_entities: Iterable[str] | None = None
    ) -> ReasoningChain:
        """The hops so far: confidence is their mean, success an answer with a confidence above 0.5."""
        total = sum(hop.confidence for hop in self.hops) / len(self.hops) if self.hops else 0.0
        return ReasoningChain(
            question=question,
            answer=answer,
            hops=list(self.hops),
            bridge_entities=list(bridge_entities or ()),
            total_confidence=total,
            success=bool(answer.strip()) and total > 0.5,
        )

    def visualize_attention_flow(self, path: str | Path | None = None) -> Figure:
        """Which slots each hop read, one row a hop; written to ``path`` where one is given.

        Raises:
            ValueError: no hop with its attention was recorded. ImportError: no matplotlib.
        """
        rows = [hop.attention_weights for hop in self.hops if hop.attention_weights is not None]
        if not rows:
            raise ValueError("hops: expected at least one with attention, got none")
        figure = new_figure((8, 1.5 + 0.5 * len(rows)))
        axes = figure.add_subplot()
        means = np.stack([row.reshape(-1, row.shape[-1]).mean(0) for row in rows])
        figure.colorbar(axes.imshow(means, aspect="auto", cmap="viridis"), label="mean read weight")
        kept = [hop for hop in self.hops if hop.attention_weights is not None]
        axes.set_yticks(range(len(rows)), [f"{hop.hop_number}: {hop.question_part[:30]}" for hop in kept])
        axes.set(xlabel="memory slot", title="attention flow")
        if path is not None:
            save_figure(figure, path)
        return figure

    def track_segment(
        self, segment_idx: int, attention_weights: Array, entities: Sequence[str] | Mapping[str, Sequence[int]] = ()
    ) -> None:
        """Record a segment: attention (heads, T) or (T,), and the entities that it names.

        An entity's attention is the mean of the whole segment's; where ``entities`` maps names to the tokens they
        stand at, the mean over those.
        """
        weights = as_array("attention_weights", attention_weights, 1, 2)
        tokens = weights.mean(0) if weights.ndim == 2 else weights
        mean = float(tokens.mean()) if tokens.size else 0.0
        if isinstance(entities, Mapping):
            found = {name: float(tokens[list(at)].mean()) if len(at) else mean for name, at in entities.items()}
        else:
            found = dict.fromkeys(entities, mean)
        self.segments[segment_idx] = _Segment(tokens.tolist(), found)

    def mark_answer(self, segment_idx: int, answer: str = "") -> None:
        """The answer was found in this segment.

        Raises:
            ValueError: the segment was not tracked.
        """
        if segment_idx not in self.segments:
            raise ValueError(f"segment_idx: expected one of {sorted(self.segments)}, got {segment_idx}")
        self.segments[segment_idx].is_answer, self.segments[segment_idx].answer = True, answer

    def detect_bridge_entities(self, min_segments: int = 2) -> dict[str, list[int]]:
        """Entities that at least ``min_segments`` segments name, with those segments."""
        places: dict[str, list[int]] = {}
        for index in sorted(self.segments):
            for entity in self.segments[index].entities:
                places.setdefault(entity, []).append(index)
        return {entity: where for entity, where in places.items() if len(where) >= min_segments}

    def detect_hops(self) -> list[SegmentHop]:
        """Steps between neighbouring segments of a bridge whose mean attention reaches the threshold."""
        hops = []
        for entity, where in self.detect_bridge_entities().items():
            for start, end in itertools.pairwise(where):
                flow = (self.segments[start].entities[entity] + self.segments[end].entities[entity]) / 2
                if flow >= self.min_attention_threshold:
                    hops.append(SegmentHop(start, end, entity, flow, min(1.0, 2 * flow)))
        return sorted(hops, key=lambda hop: (hop.from_segment, hop.to_segment, hop.entity))

    def get_hop_sequence(self, to_answer: bool = True) -> list[SegmentHop]:
        """From the first segment always the most confident step on; ends at the answer's segment if one is marked."""
        hops = self.detect_hops()
        goals = {index for index, segment in self.segments.items() if segment.is_answer} if to_answer else set()
        at = min(self.segments, default=0)
        path: list[SegmentHop] = []
        while at not in goals:
            onward = [hop for hop in hops if hop.from_segment == at]
            if not onward:
                break
            path.append(max(onward, key=lambda hop: hop.confidence))
            at = path[-1].to_segment
        return path

    def get_statistics(self) -> dict[str, Any]:
        """Counts and means over what was recorded."""
        hops = self.detect_hops()
        return {
            "num_segments": len(self.segments),
            "num_entities": len({entity for segment in self.segments.values() for entity in segment.entities}),
            "num_bridge_entities": len(self.detect_bridge_entities()),
            "num_hops": len(hops),
            "num_recorded_hops": len(self.hops),
            "mean_hop_confidence": sum(hop.confidence for hop in hops) / len(hops) if hops else 0.0,
            "mean_read_confidence": sum(h.confidence for h in self.hops) / len(self.hops) if self.hops else 0.0,
            "answer_segments": sorted(i for i, segment in self.segments.items() if segment.is_answer),
        }

    def export_analysis(self, path: str | Path) -> Path:
        """Write everything except the arrays of the recorded hops as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded = ("hop_number", "question_part", "extracted_info", "confidence")
        content = {
            "statistics": self.get_statistics(),
            "bridge_entities": self.detect_bridge_entities(),
            "hops": [asdict(hop) for hop in self.detect_hops()],
            "hop_sequence": [asdict(hop) for hop in self.get_hop_sequence()],
            "recorded_hops": [{name: getattr(hop, name) for name in recorded} for hop in self.hops],
            "segments": {str(index): asdict(segment) for index, segment in sorted(self.segments.items())},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def reset(self) -> None:
        """Forget everything recorded."""
        self.hops.clear()
        self.segments.clear()

    extract_simple_entities = staticmethod(extract_simple_entities)
