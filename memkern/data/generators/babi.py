"""bAbI stories (Weston et al. 2015, the user's own copy of the files) cut into segments of a few sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memkern.data.generators.segmented import CLS, PAD, QUERY, SEP, SPECIALS, SegmentedQuestions

_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class BabiStory:
    """One question with the sentences that were told before it; ``support`` are indices of the sentences it needs."""

    sentences: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def read_babi(path: str | Path) -> list[BabiStory]:
    """Every question of a bAbI file, in its order.

    Raises:
        ValueError: a line that is not in bAbI's format, named by file and number.
    """
    stories: list[BabiStory] = []
    told: list[str] = []
    place: dict[int, int] = {}  # the file numbers questions and sentences together
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        head, _, text = line.strip().partition(" ")
        if not head.isdigit() or not text:
            raise ValueError(f"{path}:{number}: expected a bAbI line 'number text', got {line!r}")
        if head == "1":
            told, place = [], {}
        question, *rest = (part.strip() for part in text.split("\t"))
        if not rest:
            place[int(head)] = len(told)
            told.append(question)
            continue
        try:
            answer, support = rest
            needed = tuple(place[int(fact)] for fact in support.split())
        except (ValueError, KeyError):
            raise ValueError(f"{path}:{number}: expected 'question<tab>answer<tab>facts', got {line!r}") from None
        stories.append(BabiStory(tuple(told), question, answer, needed))
    return stories


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def babi_segments(
    stories: Sequence[BabiStory],
    *,
    sentences: int = 2,
    vocabulary: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[SegmentedQuestions, list[str]]:
    """Stories as documents: ``sentences`` sentences a segment, then a segment of the question and all answers.

    The answers stand in random order behind ``<query>``; the answer is a position among them, so that a blind guess
    is right once in ``len(candidates)``. The distance is that of the last supporting sentence's segment.

    Args:
        stories: from :func:`read_babi`.
        sentences: how many stand in one segment.
        vocabulary: words by token id (a training set's, given for its test set); None collects them.
        candidates: the possible answers; None collects those of ``stories``.
        seed: the order of the answers is drawn from it.

    Returns:
        The questions and the vocabulary, special tokens first.

    Raises:
        ValueError: a word or answer that is not in the given vocabulary or candidates.
    """
    if sentences < 1:
        raise ValueError(f"sentences: expected at least 1, got {sentences}")
    answers = sorted({story.answer for story in stories}) if candidates is None else list(candidates)
    words = _collect(stories, answers) if vocabulary is None else list(vocabulary)
    index = {word: i for i, word in enumerate(words)}
    draw = random.Random(seed)

    def ids(text: Iterable[str]) -> list[int]:
        try:
            return [index[word] for word in text]
        except KeyError as error:
            raise ValueError(f"vocabulary: the word {error.args[0]!r} is not in it") from None

    documents: list[list[list[int]]] = []
    marks, distances = [], []
    for story in stories:
        if story.answer not in answers:
            raise ValueError(f"candidates: the answer {story.answer!r} is not among them")
        starts = range(0, len(story.sentences), sentences)
        document = [ids(_words(" ".join(story.sentences[start : start + sentences]))) for start in starts]
        shuffled = draw.sample(answers, len(answers))
        document.append([*ids(_words(story.question)), QUERY, *ids(shuffled)])
        documents.append([[*segment, SEP, CLS] for segment in document])
        marks.append(shuffled.index(story.answer))
        distances.append(len(starts) - max(story.support) // sentences if story.support else -1)

    steps = max((len(document) for document in documents), default=1)
    length = max((len(segment) for document in documents for segment in document), default=2)
    tokens = torch.full((len(documents), steps, length), PAD)
    for row, document in enumerate(documents):
        for step, segment in enumerate(document, start=steps - len(document)):
            tokens[row, step, length - len(segment) :] = torch.tensor(segment)
    first = length - 2 - len(answers)
    questions = SegmentedQuestions(
        input_ids=tokens,
        attention_mask=(tokens != PAD).to(torch.int64),
        segment_mask=(tokens[..., -1] == CLS),
        answer_position=first + torch.tensor(marks, dtype=torch.int64),
        candidates=torch.arange(first, first + len(answers)).expand(len(documents), len(answers)),
        distance=torch.tensor(distances, dtype=torch.int64),
    )
    return questions, words


def _collect(stories: Sequence[BabiStory], answers: Sequence[str]) -> list[str]:
    found = set(answers)
    for story in stories:
        found.update(_words(story.question), *(_words(sentence) for sentence in story.sentences))
    return [*SPECIALS, *sorted(found)]
