"""memkern: fused operators for memory-augmented transformers, and the models built on them."""

__version__ = "0.1.0"
