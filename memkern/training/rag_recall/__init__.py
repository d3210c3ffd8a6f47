"""Position recall by Self-RAG: does the answer depend on where the fact stood? Reader first, contrastive after."""

from memkern.training.rag_recall.report import markdown, plot, verdicts
from memkern.training.rag_recall.run import Recall, SeedResult, quick_settings, run, run_seed
from memkern.training.rag_recall.task import RecallSettings

__all__ = [
    "Recall",
    "RecallSettings",
    "SeedResult",
    "markdown",
    "plot",
    "quick_settings",
    "run",
    "run_seed",
    "verdicts",
]
