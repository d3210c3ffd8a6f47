"""The cross-segment recall protocol: does a fact survive k segments in memory, and is it memory that carries it?"""

from memkern.training.gmm_recall.arms import ARMS, Arm, Sizes, build
from memkern.training.gmm_recall.evaluate import Accuracy, evaluate, routing_use
from memkern.training.gmm_recall.protocol import Protocol, run_one, run_protocol
from memkern.training.gmm_recall.report import markdown, plot, rows, verdicts
from memkern.training.gmm_recall.train import Curriculum, TrainedRun, train

__all__ = [
    "ARMS",
    "Accuracy",
    "Arm",
    "Curriculum",
    "Protocol",
    "Sizes",
    "TrainedRun",
    "build",
    "evaluate",
    "markdown",
    "plot",
    "routing_use",
    "rows",
    "run_one",
    "run_protocol",
    "train",
    "verdicts",
]
