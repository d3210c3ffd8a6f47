"""Retrieval in Triton: attention over retrieved pairs, fusion of gated sources, the document-level span loss."""

from .attention import retrieved_attention_bwd, retrieved_attention_fwd
from .fusion import fuse_sources_bwd, fuse_sources_fwd
from .span import span_loss_bwd, span_loss_fwd

__all__ = [
    "fuse_sources_bwd",
    "fuse_sources_fwd",
    "retrieved_attention_bwd",
    "retrieved_attention_fwd",
    "span_loss_bwd",
    "span_loss_fwd",
]
