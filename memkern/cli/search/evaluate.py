"""How well a store finds the passages of given questions: recall@k, nDCG and MRR, embeddings beside BM25."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memkern.analysis.retrieval_metrics import retrieval_report
from memkern.cli.search.corpus import Piece
from memkern.store import MemoryStore
from memkern.store.bm25 import BM25, reciprocal_rank_fusion
from memkern.store.embedders import Embedder

DEPTH = 10


@dataclass(frozen=True)
class Question:
    """A question and the passage that answers it."""

    text: str
    passage: str


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines (``question``, ``passage``) or from a SQuAD-format file.

    Raises:
        ValueError: neither of the two, or no question in it.
    """
    try:
        content = path.read_text(encoding="utf-8")
        squad = json.loads(content) if content.lstrip().startswith("{") and '"paragraphs"' in content else None
        if squad is not None:
            found = [
                Question(qa["question"].strip(), paragraph["context"])
                for article in squad["data"]
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
                if not qa.get("is_impossible", False)
            ]
        else:
            lines = [json.loads(line) for line in content.splitlines() if line.strip()]
            found = [Question(str(line["question"]), str(line["passage"])) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--evaluate: {path} is neither JSON lines with question and passage nor a SQuAD-format file "
            f"({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise ValueError(f"--evaluate: {path} holds no question")
    return found


def passages(questions: Sequence[Question]) -> list[Piece]:
    """The questions' own passages, each once, as what is searched."""
    unique = dict.fromkeys(question.passage for question in questions)
    return [Piece(text, f"passage {i}", 0, len(text)) for i, text in enumerate(unique)]


def relevant(question: Question, texts: Sequence[tuple[int, str]]) -> set[int]:
    """Ids of the chunks that hold the passage, or that the passage holds; white space does not count."""
    passage = " ".join(question.passage.split())
    return {id for id, text in texts if text == passage or passage in text or text in passage}


def evaluate(store: MemoryStore, embedder: Embedder, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Metrics of each ranking by name: ``embeddings``, and ``bm25`` and ``hybrid`` where the library is installed."""
    texts = [(id, " ".join(text.split())) for id, text in zip(store.ids, store.chunks, strict=True)]
    wanted = [relevant(question, texts) for question in questions]
    queries = embedder.encode([question.text for question in questions], kind="query")
    rankings: dict[str, list[list[Any]]] = {
        "embeddings": [[hit.id for hit in hits] for hits in store.search_batched(queries, min(DEPTH, len(store)))]
    }
    try:
        bm25 = BM25(store.chunks, store.ids)
    except ImportError:
        pass
    else:
        rankings["bm25"] = [[id for id, _ in bm25.search(question.text, DEPTH)] for question in questions]
        rankings["hybrid"] = [
            reciprocal_rank_fusion(pair)[:DEPTH] for pair in zip(rankings["embeddings"], rankings["bm25"], strict=True)
        ]
    return {name: retrieval_report(ranked, wanted) for name, ranked in rankings.items()}
