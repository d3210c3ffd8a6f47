"""The memory of the Differentiable Neural Computer: one step, a scan over steps, and the parts of a step alone.

State is explicit and batched: functions take a :class:`MemoryState` and return a new one. Letters: B batch, N slots, W
slot width, R read heads, H write heads, T steps.

Source: Graves et al., "Hybrid computing using a neural network with dynamic external memory", Nature 538 (2016),
Methods.
"""

from memkern.ops.memory.addressing import allocation_weights, content_weights, sharpen
from memkern.ops.memory.parts import directional_weights, read_memory, update_links, update_usage, write_memory
from memkern.ops.memory.recurrence import initial_memory_state, memory_scan, memory_step
from memkern.reference.memory import MemoryInterface, MemoryState

__all__ = [
    "MemoryInterface",
    "MemoryState",
    "allocation_weights",
    "content_weights",
    "directional_weights",
    "initial_memory_state",
    "memory_scan",
    "memory_step",
    "read_memory",
    "sharpen",
    "update_links",
    "update_usage",
    "write_memory",
]
