"""Training: configurations, optimiser groups, losses, the trainers, and what predicts with a trained model."""

from memkern.training.config import (
    GMMTrainingConfig,
    TrainingConfig,
    gmm_balanced_config,
    gmm_large_config,
    gmm_small_config,
)
from memkern.training.groups import param_groups
from memkern.training.rag_config import RAGTrainingConfig
from memkern.training.rag_trainer import RAGTrainer, RAGTrainerState

__all__ = [
    "GMMTrainingConfig",
    "RAGTrainer",
    "RAGTrainerState",
    "RAGTrainingConfig",
    "TrainingConfig",
    "gmm_balanced_config",
    "gmm_large_config",
    "gmm_small_config",
    "param_groups",
]
