"""What training and evaluation runs are judged by: metrics, trackers, plots. Results in, numbers and files out."""

from memkern.analysis.figures import VISUALIZATION_AVAILABLE
from memkern.analysis.hops import (
    BridgeEntity,
    HopInfo,
    HopTracker,
    ReasoningChain,
    ReasoningHop,
    attention_confidence,
    extract_simple_entities,
)
from memkern.analysis.intervals import wilson_interval
from memkern.analysis.multihop import MultiHopDebugger, MultiHopMetrics
from memkern.analysis.retrieval_metrics import mean_reciprocal_rank, ndcg_at_k, recall_at_k, retrieval_report
from memkern.analysis.routing import GMMAnalyzer, ward_linkage
from memkern.analysis.squad import normalize_answer, squad_evaluate
from memkern.analysis.visualizer import MemoryVisualizer

__all__ = [
    "VISUALIZATION_AVAILABLE",
    "BridgeEntity",
    "GMMAnalyzer",
    "HopInfo",
    "HopTracker",
    "MemoryVisualizer",
    "MultiHopDebugger",
    "MultiHopMetrics",
    "ReasoningChain",
    "ReasoningHop",
    "attention_confidence",
    "extract_simple_entities",
    "mean_reciprocal_rank",
    "ndcg_at_k",
    "normalize_answer",
    "recall_at_k",
    "retrieval_report",
    "squad_evaluate",
    "ward_linkage",
    "wilson_interval",
]
