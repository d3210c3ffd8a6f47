"""Tasks with exact answers, drawn from a seed: the same arguments give the same tensors on every machine."""

from memkern.data.generators.babi import BabiStory, babi_segments, read_babi
from memkern.data.generators.pointer import cross_segment_pointer
from memkern.data.generators.recall import PositionRecall, position_recall
from memkern.data.generators.segmented import SegmentedQuestions

__all__ = [
    "BabiStory",
    "PositionRecall",
    "SegmentedQuestions",
    "babi_segments",
    "cross_segment_pointer",
    "position_recall",
    "read_babi",
]
