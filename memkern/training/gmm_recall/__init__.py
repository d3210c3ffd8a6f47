"""The cross-segment recall protocol: does a fact survive k segments in memory, and is it memory that carries it?"""

from memkern.training.gmm_recall.arms import ARMS, Arm, Sizes, build
from memkern.training.gmm_recall.evaluate import Accuracy, evaluate
from memkern.training.gmm_recall.train import Curriculum, TrainedRun, train

__all__ = ["ARMS", "Accuracy", "Arm", "Curriculum", "Sizes", "TrainedRun", "build", "evaluate", "train"]
