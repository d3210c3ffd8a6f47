"""Data for the models: chunkers, featurisers, loaders and generators. They stand on the ground."""

from memkern.data.chunkers import SentenceChunker, TextChunk, TextChunker

__all__ = ["SentenceChunker", "TextChunk", "TextChunker"]
