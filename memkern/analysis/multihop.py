"""Numbers over many reasoning chains, and what went wrong in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memkern.analysis.figures import as_array
from memkern.analysis.hops import HopTracker, ReasoningChain
from memkern.analysis.squad import exact_match, f1_score


@dataclass
class MultiHopMetrics:
    """Collects chains with what was expected of them; :meth:`compute` gives the means."""

    _rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, chain: ReasoningChain, answer: str | None = None, bridge_entities: Sequence[str] = ()) -> None:
        """Add a chain with the right answer, None for unknown, and the entities that it should have gone over."""
        row = {
            "success_rate": float(chain.success),
            "mean_confidence": chain.total_confidence,
            "mean_hops": float(len(chain.hops)),
        }
        if answer is not None:
            row |= {"exact": exact_match(answer, chain.answer), "f1": f1_score(answer, chain.answer)}
        if bridge_entities:
            found = set(bridge_entities) & set(chain.bridge_entities)
            row["bridge_recall"] = len(found) / len(set(bridge_entities))
        self._rows.append(row)

    def compute(self) -> dict[str, float]:
        """Means over the chains that have the number, and ``chains``, how many there are."""
        report = {"chains": float(len(self._rows))}
        for name in ("success_rate", "mean_confidence", "mean_hops", "exact", "f1", "bridge_recall"):
            values = [row[name] for row in self._rows if name in row]
            if values:
                report[name] = sum(values) / len(values)
        return report

    def reset(self) -> None:
        """Forget all chains."""
        self._rows.clear()


@dataclass
class MultiHopDebugger:
    """Says in words what is odd about recorded hops.

    Args:
        tracker: what was recorded.
        low_confidence: hops below it are called unfocused.
    """

    tracker: HopTracker
    low_confidence: float = 0.2

    def diagnose(self) -> list[str]:
        """One sentence for each finding; empty when nothing is odd."""
        found = []
        slots_read: set[int] = set()
        for hop in self.tracker.hops:
            if hop.confidence < self.low_confidence:
                found.append(f"hop {hop.hop_number} reads without focus (confidence {hop.confidence:.2f})")
            if hop.attention_weights is not None:
                slots_read.add(int(hop.attention_weights.reshape(-1, hop.attention_weights.shape[-1]).mean(0).argmax()))
        if len(self.tracker.hops) > 1 and len(slots_read) == 1:
            found.append(f"all {len(self.tracker.hops)} hops read slot {slots_read.pop()} most")
        if self.tracker.segments:
            if not self.tracker.detect_bridge_entities():
                found.append("no entity is named in two segments")
            goals = [index for index, segment in self.tracker.segments.items() if segment.is_answer]
            path = self.tracker.get_hop_sequence()
            if not goals:
                found.append("no segment is marked as the answer's")
            elif min(self.tracker.segments) not in goals and (not path or path[-1].to_segment not in goals):
                found.append(f"no chain of hops reaches the answer in segment {goals[0]}")
        return found

    def check_memory(self, memory_info: Mapping[str, Any]) -> list[str]:
        """Findings about one ``memory_info``: NaN, slots that are all the same, a full or an unused memory."""
        found = []
        for name, value in memory_info.items():
            if value is not None and not (abs(as_array(name, value)) < float("inf")).all():
                found.append(f"{name} has values that are not finite")
        memory = memory_info.get("memory_state")
        if memory is not None:
            slots = as_array("memory_state", memory, 2, 3)
            if slots.shape[-2] > 1 and (slots == slots[..., :1, :]).all():
                found.append("all memory slots are equal")
        usage = memory_info.get("usage")
        if usage is not None:
            used = as_array("usage", usage, 1, 2)
            if (used > 0.99).all():
                found.append("memory is full: every slot is in use")
            elif (used < 0.01).all():
                found.append("memory is unused")
        return found
