"""Question-answering data in SQuAD's form (v1.1 and v2.0): local JSON, ``datasets``, or plain dictionaries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SquadSource = str | Path | Mapping[str, Any] | Iterable[Any]


@dataclass(frozen=True)
class SquadExample:
    """One question about one passage; no answers for a question that cannot be answered (or is not yet)."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    answer_starts: tuple[int, ...] = ()
    title: str = ""

    def bad_answer(self) -> str | None:
        """What is wrong with the first answer that does not stand where it should, or None."""
        if len(self.answers) != len(self.answer_starts):
            return f"{len(self.answers)} answer texts but {len(self.answer_starts)} answer_start"
        for text, start in zip(self.answers, self.answer_starts, strict=True):
            if not text.strip():
                return f"an empty answer at {start}"
            if start < 0 or self.context[start : start + len(text)] != text:
                there = self.context[max(start, 0) : max(start, 0) + len(text)]
                return f"answer {text!r} does not stand at {start}, where the passage has {there!r}"
        return None


def load_squad(source: SquadSource, split: str = "validation") -> list[SquadExample]:
    """Every question of a SQuAD-format source, in its order.

    Args:
        source: a path to a JSON file; its parsed content ({"data": articles} or the list of articles); an iterable of
            flat rows {"id", "question", "context", "answers": {"text", "answer_start"}} as ``datasets`` has them;
            :class:`SquadExample` objects; or the name of a data set for ``datasets.load_dataset``.
        split: which split of a named data set.

    Raises:
        FileNotFoundError: a path to a JSON file that is not there.
        ValueError: content that is not SQuAD's form, or an id that occurs twice.
        ImportError: a named data set, and ``datasets`` is not installed.
    """
    where = "source"
    content: Any = source
    if isinstance(source, str | Path):
        where = str(source)
        content = _read_json(Path(source)) if where.endswith(".json") else _load_named(where, split)
    if isinstance(content, Mapping):
        if not isinstance(content.get("data"), Sequence):
            raise ValueError(f"{where}: expected SQuAD's form with a list under 'data', got keys {sorted(content)}")
        content = content["data"]
    examples: list[SquadExample] = []
    for row in content:
        if isinstance(row, SquadExample):
            examples.append(row)
            continue
        try:
            examples.extend(_article(row) if "paragraphs" in row else [_flat(row)])
        except (KeyError, TypeError) as error:
            name = row.get("id", row.get("title")) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"{where}: expected SQuAD articles or rows, got {name!r}: {type(error).__name__} {error}"
            ) from None
    double = [id for id, times in Counter(example.id for example in examples).items() if times > 1]
    if double:
        raise ValueError(f"{where}: expected every question id once, got {double[0]!r} again ({len(double)} such ids)")
    return examples


def join_articles(examples: Iterable[SquadExample]) -> list[SquadExample]:
    """The same questions asked of whole articles: passages of one title in their order, joined by new lines.

    Documents of thousands of words come out, many segments each.
    """
    found = list(examples)
    passages: dict[str, dict[str, int]] = {}
    for example in found:
        starts = passages.setdefault(example.title, {})
        if example.context not in starts:
            starts[example.context] = sum(len(text) + 1 for text in starts)
    whole = {title: "\n".join(starts) for title, starts in passages.items()}
    return [
        replace(
            example,
            context=whole[example.title],
            answer_starts=tuple(s + passages[example.title][example.context] for s in example.answer_starts),
        )
        for example in found
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else: {error}") from error


def _load_named(name: str, split: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data set {name!r}: install the extra memkern[train] for `datasets`") from error
    return datasets.load_dataset(name, split=split)


def _article(row: Mapping[str, Any]) -> Iterable[SquadExample]:
    for paragraph in row["paragraphs"]:
        for question in paragraph["qas"]:
            answers = question.get("answers", [])
            yield SquadExample(
                id=str(question["id"]),
                question=question["question"],
                context=paragraph["context"],
                answers=tuple(answer["text"] for answer in answers),
                answer_starts=tuple(int(answer["answer_start"]) for answer in answers),
                title=row.get("title", ""),
            )


def _flat(row: Mapping[str, Any]) -> SquadExample:
    answers = row.get("answers") or {"text": [], "answer_start": []}
    if not isinstance(answers, Mapping):
        answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
    return SquadExample(
        id=str(row["id"]),
        question=row["question"],
        context=row["context"],
        answers=tuple(answers["text"]),
        answer_starts=tuple(int(start) for start in answers["answer_start"]),
        title=row.get("title", ""),
    )
