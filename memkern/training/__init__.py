"""Training: configurations, optimiser groups, losses, the trainers, and what predicts with a trained model."""

import importlib
from typing import TYPE_CHECKING, Any

from memkern.training.config import (
    GMMTrainingConfig,
    TrainingConfig,
    gmm_balanced_config,
    gmm_large_config,
    gmm_small_config,
)
from memkern.training.groups import param_groups
from memkern.training.rag_config import RAGTrainingConfig

if TYPE_CHECKING:
    from memkern.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig
    from memkern.training.losses import document_span_loss
    from memkern.training.predictor import Predictions, QAPredictor
    from memkern.training.rag_trainer import RAGTrainer, RAGTrainerState
    from memkern.training.xlnet_trainer import XLNetRecurrentTrainer

__all__ = [
    "GMMTrainingConfig",
    "HybridTrainer",
    "HybridTrainingConfig",
    "Predictions",
    "QAPredictor",
    "RAGTrainer",
    "RAGTrainerState",
    "RAGTrainingConfig",
    "TrainingConfig",
    "XLNetRecurrentTrainer",
    "document_span_loss",
    "gmm_balanced_config",
    "gmm_large_config",
    "gmm_small_config",
    "param_groups",
]

# What needs the operators, the models or accelerate is imported when it is asked for.
_LAZY = {
    "HybridTrainer": "hybrid_trainer",
    "HybridTrainingConfig": "hybrid_trainer",
    "Predictions": "predictor",
    "QAPredictor": "predictor",
    "RAGTrainer": "rag_trainer",
    "RAGTrainerState": "rag_trainer",
    "XLNetRecurrentTrainer": "xlnet_trainer",
    "document_span_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"memkern.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'memkern.training' has no attribute {name!r}")
