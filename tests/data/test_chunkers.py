"""Chunkers: offsets are exact, nothing is lost, no window is redundant."""

from __future__ import annotations

from itertools import pairwise

import pytest

from memkern.data import SentenceChunker, TextChunker
from memkern.data.chunkers import sentence_spans, windows

TEXT = '  The  quick brown\nfox (it was quick!) jumps over. Did it? Yes: "It did." The end of 3.14 words…\n\n'


@pytest.mark.parametrize("count", [0, 1, 5, 9, 10, 11, 23, 100])
@pytest.mark.parametrize(("size", "overlap"), [(10, 4), (10, 0), (10, 9), (1, 0)])
def test_windows_cover_everything_once(count: int, size: int, overlap: int) -> None:
    found = windows(count, size, overlap)
    assert {i for a, b in found for i in range(a, b)} == set(range(count))
    assert all(b - a <= size for a, b in found)
    assert all(nxt[0] == prev[0] + size - overlap for prev, nxt in pairwise(found))
    # Each window brings something that its neighbour does not have.
    assert all(nxt[1] > prev[1] for prev, nxt in pairwise(found))
    assert windows(10, 10, 4) == [(0, 10)]


def test_words() -> None:
    chunks = TextChunker(4, 1).chunk(TEXT)
    assert all(TEXT[c.start : c.end] == c.text for c in chunks)
    assert [c.text.split() for c in chunks] == [TEXT.split()[i : i + 4] for i in range(0, len(TEXT.split()) - 1, 3)]
    assert TextChunker().chunk(" \n ") == []


def test_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (memkern[models])")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (memkern[models])")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "quick": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    chunks = TextChunker(5, 2).chunk_with_tokenizer(TEXT, tokenizer)
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert all(TEXT[c.start : c.end] == c.text for c in chunks)
    assert list(chunks[0].token_ids) == whole[:5]
    assert list(chunks[1].token_ids) == whole[3:8]
    assert chunks[-1].token_ids[-1] == whole[-1]
    with pytest.raises(ValueError, match="fast tokenizer"):
        TextChunker(5, 2).chunk_with_tokenizer(TEXT, object())


def test_sentences() -> None:
    spans = [TEXT[a:b] for a, b in sentence_spans(TEXT)]
    assert spans == [
        "The  quick brown\nfox (it was quick!) jumps over.",
        "Did it?",
        'Yes: "It did."',
        "The end of 3.14 words…",
    ]
    chunks = SentenceChunker(max_words=6, min_words=0, overlap=1).chunk(TEXT)
    assert all(TEXT[c.start : c.end] == c.text for c in chunks)
    # A sentence longer than the limit stands alone, uncut; neighbours share a sentence.
    assert chunks[0].text == spans[0]
    assert [c.text.endswith(spans[-1]) for c in chunks][-1]
    assert {s for s in spans for c in chunks if s in c.text} == set(spans)
    joined = SentenceChunker(max_words=12, min_words=11, overlap=0).chunk(TEXT)
    assert joined[-1].text.endswith("words…")
    assert len(joined) == 1


@pytest.mark.parametrize("call", [lambda: TextChunker(0), lambda: TextChunker(4, 4), lambda: SentenceChunker(5, 6)])
def test_bad_sizes(call: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()  # type: ignore[operator]
