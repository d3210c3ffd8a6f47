"""Modules over the operators: the gated memory mixture, its router, updater and reader, and the differentiable memory.

Thin: parameters, checks with the messages of the earlier systems, and one call of an operator. State goes in and comes
out; what ``set_*`` stores is a convenience beside the learned initial values, never in their place.
"""

from memkern.nn.controller import MemoryController
from memkern.nn.differentiable import DifferentiableMemory
from memkern.nn.fusion import MemoryFusion
from memkern.nn.gating import MemoryGatingNetwork
from memkern.nn.mixture import GatedMemoryMixture
from memkern.nn.reader import AggregatedMemoryReader
from memkern.nn.state import load_state, save_state
from memkern.nn.updater import ExpertUpdater

__all__ = [
    "AggregatedMemoryReader",
    "DifferentiableMemory",
    "ExpertUpdater",
    "GatedMemoryMixture",
    "MemoryController",
    "MemoryFusion",
    "MemoryGatingNetwork",
    "load_state",
    "save_state",
]
