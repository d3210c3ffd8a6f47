"""Text files to stored chunks: read, cut, embed and add, in batches with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memkern.data.chunkers import TextChunker
from memkern.store import MemoryStore
from memkern.store.embedders import Embedder, HashingEmbedder

PYDOC = "pydoc"
_BATCH = 256

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """A chunk of a source with its character offsets there."""

    text: str
    source: str
    start: int
    end: int

    @property
    def metadata(self) -> dict[str, object]:
        return {"source": self.source, "start": self.start, "end": self.end}


def read(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(source, text) of each file; the name ``pydoc`` stands for the language reference that CPython carries.

    Raises:
        ValueError: a file that is missing or is no UTF-8 text, named.
    """
    for path in paths:
        if str(path) == PYDOC:
            from pydoc_data.topics import topics

            yield from ((f"pydoc:{name}", topics[name]) for name in sorted(topics))
            continue
        try:
            yield str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: {path} cannot be read as UTF-8 text: {error}") from error


def cut(texts: Iterable[tuple[str, str]], words: int, overlap: int) -> list[Piece]:
    """Windows of ``words`` words of every text, neighbours sharing ``overlap``."""
    chunker = TextChunker(words, overlap)
    return [Piece(c.text, source, c.start, c.end) for source, text in texts for c in chunker.chunk(text)]


def build(
    pieces: Sequence[Piece], embedder: Embedder, index: str = "exact", advance: Advance = lambda n: None
) -> MemoryStore:
    """A store of the pieces; the hashing embedder first learns how frequent each word is in them."""
    if isinstance(embedder, HashingEmbedder):
        embedder.fit(piece.text for piece in pieces)
    store = MemoryStore(embedder.d_model, max(1, len(pieces)), index=index)
    for start in range(0, len(pieces), _BATCH):
        batch = pieces[start : start + _BATCH]
        texts = [piece.text for piece in batch]
        store.add_batch(texts, embedder.encode(texts), [piece.metadata for piece in batch])
        advance(len(batch))
    return store
