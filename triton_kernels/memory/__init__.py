"""The memory in Triton: one step, the scan, and the parts of a step."""

from .parts import (
    allocation_weights_bwd,
    allocation_weights_fwd,
    content_weights_bwd,
    content_weights_fwd,
    directional_weights_bwd,
    directional_weights_fwd,
    read_memory_bwd,
    read_memory_fwd,
    sharpen_bwd,
    sharpen_fwd,
    update_links_bwd,
    update_links_fwd,
    update_usage_bwd,
    update_usage_fwd,
    write_memory_bwd,
    write_memory_fwd,
)
from .scan import memory_scan_bwd, memory_scan_fwd
from .step import memory_step_bwd, memory_step_fwd

__all__ = [
    "allocation_weights_bwd",
    "allocation_weights_fwd",
    "content_weights_bwd",
    "content_weights_fwd",
    "directional_weights_bwd",
    "directional_weights_fwd",
    "memory_scan_bwd",
    "memory_scan_fwd",
    "memory_step_bwd",
    "memory_step_fwd",
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
