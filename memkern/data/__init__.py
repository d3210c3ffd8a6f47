"""Data for the models: chunkers, featurisers, loaders and generators. They stand on the ground."""

from memkern.data.algorithmic import Sequences, copy_task, recall_task
from memkern.data.chunkers import SentenceChunker, TextChunk, TextChunker
from memkern.data.features import group_documents, squad_features
from memkern.data.loader import SegmentSelector, TimeStepMajorDataLoader
from memkern.data.squad import SquadExample, join_articles, load_squad
from memkern.data.tokenizers import configure_memory_tokens, train_xlnet_tokenizer

__all__ = [
    "SegmentSelector",
    "SentenceChunker",
    "Sequences",
    "SquadExample",
    "TextChunk",
    "TextChunker",
    "TimeStepMajorDataLoader",
    "configure_memory_tokens",
    "copy_task",
    "group_documents",
    "join_articles",
    "load_squad",
    "recall_task",
    "squad_features",
    "train_xlnet_tokenizer",
]
