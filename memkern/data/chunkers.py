"""Cut long text into overlapping windows with exact offsets: ``text[chunk.start : chunk.end] == chunk.text``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"\S+")
# A sentence ends at . ! or ? (with closing quotes or brackets) before white space that no small letter follows.
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[^a-z\s])")


@dataclass(frozen=True)
class TextChunk:
    """A window of a text; ``token_ids`` where a tokenizer made it."""

    text: str
    start: int
    end: int
    token_ids: tuple[int, ...] | None = None


def windows(count: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """[start, end) windows of ``size`` units that share ``overlap``; the last ends at ``count``, none is redundant."""
    found = []
    for start in range(0, count, size - overlap):
        found.append((start, min(start + size, count)))
        if start + size >= count:
            break
    return found


class TextChunker:
    """Windows of whitespace-separated words, or of a tokenizer's tokens.

    Args:
        chunk_size: words (or tokens) in a window.
        overlap: words (or tokens) that neighbours share, below ``chunk_size``.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, chunk_size: int = 256, overlap: int = 64) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        if not 0 <= overlap < chunk_size:
            raise ValueError(f"overlap: expected 0 <= overlap < chunk_size ({chunk_size}), got {overlap}")
        self.chunk_size, self.overlap = chunk_size, overlap

    def chunk(self, text: str) -> list[TextChunk]:
        """Windows of words; none for a text without words."""
        words = [match.span() for match in _WORD.finditer(text)]
        return [
            TextChunk(text[words[start][0] : words[end - 1][1]], words[start][0], words[end - 1][1])
            for start, end in windows(len(words), self.chunk_size, self.overlap)
        ]

    def chunk_with_tokenizer(self, text: str, tokenizer: Any) -> list[TextChunk]:
        """Windows of tokens of a fast transformers tokenizer, without its special tokens; offsets are characters.

        Raises:
            ValueError: the tokenizer gives no offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("tokenizer: expected a fast tokenizer, which knows character offsets")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        chunks = []
        for first, last in windows(len(ids), self.chunk_size, self.overlap):
            start, end = offsets[first][0], offsets[last - 1][1]
            chunks.append(TextChunk(text[start:end], start, end, tuple(ids[first:last])))
        return chunks


class SentenceChunker:
    """Whole sentences up to ``max_words``; neighbours share ``overlap`` sentences.

    A window is closed when the next sentence would exceed ``max_words``. A sentence longer than that stands alone,
    uncut. A last window below ``min_words`` joins its neighbour.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, max_words: int = 512, min_words: int = 100, overlap: int = 1) -> None:
        if not 0 <= min_words <= max_words or max_words < 1:
            raise ValueError(f"min_words: expected 0 <= min_words <= max_words, got {min_words} and {max_words}")
        if overlap < 0:
            raise ValueError(f"overlap: expected at least 0 sentences, got {overlap}")
        self.max_words, self.min_words, self.overlap = max_words, min_words, overlap

    def chunk(self, text: str) -> list[TextChunk]:
        sentences = sentence_spans(text)
        lengths = [len(_WORD.findall(text[start:end])) for start, end in sentences]
        groups: list[tuple[int, int]] = []
        first = 0
        while first < len(sentences):
            last, words = first, 0
            while last < len(sentences) and (last == first or words + lengths[last] <= self.max_words):
                words += lengths[last]
                last += 1
            if last == len(sentences) and words < self.min_words and groups:
                groups[-1] = (groups[-1][0], last)
                break
            groups.append((first, last))
            if last == len(sentences):
                break
            # The shared sentences must leave room for progress.
            first = max(first + 1, last - self.overlap)
        return [
            TextChunk(text[sentences[a][0] : sentences[b - 1][1]], sentences[a][0], sentences[b - 1][1])
            for a, b in groups
        ]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence without the white space around it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]
    spans, start = [], 0
    for end in ends:
        piece = text[start:end]
        stripped = piece.strip()
        if stripped:
            begin = start + piece.index(stripped)
            spans.append((begin, begin + len(stripped)))
        start = end
    return spans
