"""Text to vectors: a hashing embedder that needs no model, transformers encoders, and SentenceTransformers.

Every embedder has ``d_model`` and ``encode(texts, kind="document" | "query") -> (n, d_model) float32 unit rows``;
one text that stands in no list gives its row.
"""

from memkern.store.embedders.base import Embedder
from memkern.store.embedders.hashing import HashingEmbedder
from memkern.store.embedders.sentence_transformer import SentenceTransformerEmbedder
from memkern.store.embedders.transformers_encoder import TransformersEmbedder

__all__ = ["Embedder", "HashingEmbedder", "SentenceTransformerEmbedder", "TransformersEmbedder", "from_name"]


def from_name(name: str) -> Embedder:
    """``hashing``, ``hashing:WIDTH``, ``transformers:MODEL`` or ``sentence:MODEL``.

    Raises:
        ValueError: another name.
    """
    kind, _, rest = name.partition(":")
    if kind == "hashing":
        return HashingEmbedder(int(rest)) if rest else HashingEmbedder()
    if kind == "transformers" and rest:
        return TransformersEmbedder.from_pretrained(rest)
    if kind == "sentence" and rest:
        return SentenceTransformerEmbedder(rest)
    raise ValueError(f"embedder: expected hashing, hashing:WIDTH, transformers:MODEL or sentence:MODEL, got {name!r}")
