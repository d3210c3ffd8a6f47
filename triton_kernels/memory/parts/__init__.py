"""The parts of a step, each as an operator of its own: one launch each way, two for the gradients that cross blocks."""

from .content import content_weights_bwd, content_weights_fwd
from .links import directional_weights_bwd, directional_weights_fwd, update_links_bwd, update_links_fwd
from .rows import (
    allocation_weights_bwd,
    allocation_weights_fwd,
    sharpen_bwd,
    sharpen_fwd,
    update_usage_bwd,
    update_usage_fwd,
)
from .vectors import read_memory_bwd, read_memory_fwd, write_memory_bwd, write_memory_fwd

__all__ = [
    "allocation_weights_bwd",
    "allocation_weights_fwd",
    "content_weights_bwd",
    "content_weights_fwd",
    "directional_weights_bwd",
    "directional_weights_fwd",
    "read_memory_bwd",
    "read_memory_fwd",
    "sharpen_bwd",
    "sharpen_fwd",
    "update_links_bwd",
    "update_links_fwd",
    "update_usage_bwd",
    "update_usage_fwd",
    "write_memory_bwd",
    "write_memory_fwd",
]
