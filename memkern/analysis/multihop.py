"""Numbers over many reasoning chains, and what went wrong in one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memkern.analysis.figures import as_array
from memkern.analysis.hops import HopTracker, ReasoningChain
from memkern.analysis.squad import exact_match, f1_score

LOW_CONFIDENCE = 0.3


class MultiHopMetrics:
    """Scores of reasoning chains against the right ones."""

    @staticmethod
    def hop_accuracy(
        predicted_chains: Sequence[ReasoningChain], gold_chains: Sequence[ReasoningChain]
    ) -> dict[str, float]:
        """Means over pairs of chains.

        Returns:
            ``exact_match`` and ``f1`` of the answers by SQuAD's rules; ``partial_match``, the share of chains of which
            at least one hop extracted what a hop of the right chain did; ``bridge_entity_recall`` and
            ``bridge_entity_precision`` over the pairs where the right chain has bridges; ``avg_confidence``;
            ``success_rate``. All 0 without chains.

        Raises:
            ValueError: lists of different lengths.
        """
        if len(predicted_chains) != len(gold_chains):
            raise ValueError(f"gold_chains: expected {len(predicted_chains)}, got {len(gold_chains)}")
        sums = dict.fromkeys(("exact_match", "f1", "partial_match", "avg_confidence", "success_rate"), 0.0)
        recalls, precisions = [], []
        for chain, gold in zip(predicted_chains, gold_chains, strict=True):
            sums["exact_match"] += exact_match(gold.answer, chain.answer)
            sums["f1"] += f1_score(gold.answer, chain.answer)
            extracted = {hop.extracted_info.lower() for hop in chain.hops} - {""}
            sums["partial_match"] += bool(extracted & {hop.extracted_info.lower() for hop in gold.hops})
            sums["avg_confidence"] += chain.total_confidence
            sums["success_rate"] += chain.success
            if gold.bridge_entities:
                found, wanted = set(chain.bridge_entities), set(gold.bridge_entities)
                recalls.append(len(found & wanted) / len(wanted))
                precisions.append(len(found & wanted) / len(found) if found else 0.0)
        report = {name: value / max(len(predicted_chains), 1) for name, value in sums.items()}
        for name, values in (("recall", recalls), ("precision", precisions)):
            report[f"bridge_entity_{name}"] = sum(values) / len(values) if values else 0.0
        return report

    @staticmethod
    def analyze_error_patterns(failed_chains: Sequence[ReasoningChain]) -> dict[str, float]:
        """How failed chains failed: counts of each pattern, a chain may show several."""
        hops = [len(chain.hops) for chain in failed_chains]
        return {
            "total_failures": len(failed_chains),
            "incomplete_chains": sum(count < 2 for count in hops),
            "low_confidence": sum(chain.total_confidence < LOW_CONFIDENCE for chain in failed_chains),
            "missing_bridge": sum(not chain.bridge_entities for chain in failed_chains),
            "wrong_first_hop": sum(bool(c.hops) and c.hops[0].confidence < 0.5 for c in failed_chains),
            "avg_hops_attempted": sum(hops) / len(hops) if hops else 0.0,
        }


class MultiHopDebugger:
    """Writes chains out and says in words what is odd about recorded hops."""

    @staticmethod
    def export_reasoning_chain(chain: ReasoningChain, output_path: str | Path) -> Path:
        """Write a chain with its weights as JSON."""
        content = {
            "question": chain.question,
            "answer": chain.answer,
            "bridge_entities": chain.bridge_entities,
            "total_confidence": chain.total_confidence,
            "success": chain.success,
            "hops": [
                {
                    "hop_number": hop.hop_number,
                    "question_focus": hop.question_focus,
                    "extracted_info": hop.extracted_info,
                    "confidence": hop.confidence,
                    "read_weights": hop.memory_read_weights.tolist(),
                    "write_weights": hop.memory_write_weights.tolist(),
                }
                for hop in chain.hops
            ],
        }
        path = Path(output_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    @staticmethod
    def diagnose(tracker: HopTracker, low_confidence: float = LOW_CONFIDENCE) -> list[str]:
        """One sentence for each finding; empty when nothing is odd."""
        found = []
        slots_read: set[int] = set()
        for hop in tracker.current_chain:
            if hop.confidence < low_confidence:
                found.append(f"hop {hop.hop_number} reads without focus (confidence {hop.confidence:.2f})")
            if hop.memory_read_weights.size:
                slots = hop.memory_read_weights.shape[-1]
                slots_read.add(int(hop.memory_read_weights.reshape(-1, slots).mean(0).argmax()))
        if tracker.hop_count > 1 and len(slots_read) == 1:
            found.append(f"all {tracker.hop_count} hops read slot {slots_read.pop()} most")
        if tracker.segment_attention:
            if not tracker.detect_bridge_entities():
                found.append("no entity with enough attention is named in two segments")
            goal = tracker.answer_segment
            if goal is None:
                found.append("no segment is marked as the answer's")
            elif goal != 0 and all(hop.to_segment != goal for hop in tracker.get_hop_sequence()):
                found.append(f"no chain of hops reaches the answer in segment {goal}")
        return found

    @staticmethod
    def check_memory(memory_info: Mapping[str, Any]) -> list[str]:
        """Findings about one ``memory_info``: values that are not finite, equal slots, a full or an unused memory."""
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
