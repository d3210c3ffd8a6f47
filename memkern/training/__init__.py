"""Training: configurations, optimiser groups, losses, the trainers, and what predicts with a trained model."""

from memkern.training.config import (
    GMMTrainingConfig,
    TrainingConfig,
    gmm_balanced_config,
    gmm_large_config,
    gmm_small_config,
)
from memkern.training.groups import param_groups

__all__ = [
    "GMMTrainingConfig",
    "TrainingConfig",
    "gmm_balanced_config",
    "gmm_large_config",
    "gmm_small_config",
    "param_groups",
]
