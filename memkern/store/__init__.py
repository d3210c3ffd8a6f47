"""Text chunks with embeddings: stored, searched exactly or through FAISS, saved safely; embedders beside them."""

from memkern.store.memory_store import MemoryStore
from memkern.store.records import Chunk, Hit
from memkern.store.semantic_search import semantic_search

__all__ = ["Chunk", "Hit", "MemoryStore", "semantic_search"]
