"""Exact match and F1 as the official SQuAD scripts define them (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from memkern.data.squad import SquadSource, load_squad

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Small letters without ASCII punctuation, English articles and repeated white space; no Unicode normal form."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: str, predicted: str) -> float:
    """1.0 when the normalised texts are equal."""
    return float(normalize_answer(gold) == normalize_answer(predicted))


def f1_score(gold: str, predicted: str) -> float:
    """Harmonic mean of precision and recall over the bags of words; for no words on a side, whether both have none."""
    wanted, given = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not wanted or not given:
        return float(wanted == given)
    shared = sum((Counter(wanted) & Counter(given)).values())
    if not shared:
        return 0.0
    precision, recall = 1.0 * shared / len(given), 1.0 * shared / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def squad_evaluate(
    dataset: SquadSource,
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    *,
    na_prob_thresh: float = 1.0,
) -> dict[str, float]:
    """Scores of predicted texts, the best over each question's answers, in percent.

    Args:
        dataset: what :func:`memkern.data.load_squad` takes.
        predictions: {question id: text}, "" for no answer. A question without a prediction scores 0, with a warning;
            predictions for unknown questions do not count.
        na_probs: {question id: probability that there is no answer}. Above ``na_prob_thresh`` a prediction counts as
            no answer; the best threshold is searched for.

    Returns:
        ``exact``, ``f1``, ``total``; the same with ``HasAns_`` and ``NoAns_`` in front where there are such
        questions; with ``na_probs`` also ``best_exact``, ``best_exact_thresh``, ``best_f1``, ``best_f1_thresh``.

    Raises:
        ValueError: no questions, or ``na_probs`` without one of the predicted questions.
    """
    golds: dict[str, list[str]] = {}
    answerable: dict[str, bool] = {}
    for example in load_squad(dataset):
        golds[example.id] = [text for text in example.answers if normalize_answer(text)] or [""]
        answerable[example.id] = bool(example.answers)
    if not golds:
        raise ValueError("dataset: expected at least one question, got none")
    missing = [id for id in golds if id not in predictions]
    if missing:
        warnings.warn(f"{len(missing)} questions without a prediction score 0, {missing[0]!r} first", stacklevel=2)
    if na_probs is not None:
        without = [id for id in golds if id in predictions and id not in na_probs]
        if without:
            raise ValueError(f"na_probs: expected every predicted question, {len(without)} lack, {without[0]!r} first")

    raw = {
        name: {
            id: max(score(gold, predictions[id]) for gold in texts) if id in predictions else 0.0
            for id, texts in golds.items()
        }
        for name, score in (("exact", exact_match), ("f1", f1_score))
    }
    scores = raw
    if na_probs is not None:
        scores = {
            name: {
                id: float(not answerable[id]) if id in predictions and na_probs[id] > na_prob_thresh else value
                for id, value in values.items()
            }
            for name, values in raw.items()
        }
    report = _means(scores, golds)
    for prefix, kind in (("HasAns_", True), ("NoAns_", False)):
        ids = [id for id in golds if answerable[id] is kind]
        if ids:
            report |= {prefix + name: value for name, value in _means(scores, ids).items()}
    if na_probs is not None:
        for name in ("exact", "f1"):
            best, threshold = _best_threshold(raw[name], predictions, na_probs, answerable)
            report |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return report


def _means(scores: Mapping[str, Mapping[str, float]], ids: Iterable[str]) -> dict[str, float]:
    chosen: Sequence[str] = list(ids)
    means = {name: 100.0 * sum(values[id] for id in chosen) / len(chosen) for name, values in scores.items()}
    return means | {"total": len(chosen)}


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float],
    answerable: Mapping[str, bool],
) -> tuple[float, float]:
    """Answer the questions one by one, the surest first: where does the total stand highest?"""
    current = best = float(sum(not has for has in answerable.values()))
    threshold = 0.0
    for id in sorted((id for id in na_probs if id in predictions and id in scores), key=lambda id: na_probs[id]):
        if answerable[id]:
            current += scores[id]
        elif predictions[id]:
            current -= 1
        if current > best:
            best, threshold = current, na_probs[id]
    return 100.0 * best / len(scores), threshold
