"""BM25 by the bm25s library: the lexical baseline beside every embedding search, and half of a hybrid ranking."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from memkern.store._arguments import whole


class BM25:
    """Okapi BM25 over a list of texts.

    Args:
        texts: the documents; a result names them by position, or by ``ids`` where these are given.
        ids: a name for each document.
        k1, b: the usual constants.
    """

    def __init__(
        self, texts: Sequence[str], ids: Sequence[Hashable] | None = None, *, k1: float = 1.2, b: float = 0.75
    ) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("BM25 needs: pip install 'memkern[search]'") from error
        self._library: Any = bm25s
        self._ids = list(range(len(texts))) if ids is None else list(ids)
        if len(self._ids) != len(texts):
            raise ValueError(f"ids: expected {len(texts)}, got {len(self._ids)}")
        self._index: Any = None
        tokens = self._tokens(texts) if texts else None
        if tokens is not None and any(tokens.ids):  # the library takes no texts without any word
            self._index = bm25s.BM25(k1=k1, b=b)
            self._index.index(tokens, show_progress=False)

    def search(self, query: str, top_k: int = 5) -> list[tuple[Hashable, float]]:
        """(id, score) of the best documents, best first; documents that share no word with the query are left out."""
        top_k = whole("top_k", top_k, 1)
        if self._index is None:
            return []
        count = min(top_k, len(self._ids))
        found, scores = self._index.retrieve(self._tokens([query]), k=count, show_progress=False)
        # The library leaves the order of equal scores open; the earlier document goes first.
        pairs = sorted((-float(score), int(i)) for i, score in zip(found[0], scores[0], strict=True))
        return [(self._ids[i], -negative) for negative, i in pairs if negative < 0]

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._library.tokenize(list(texts), stopwords="en", show_progress=False)


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Hashable]], constant: int = 60) -> list[Hashable]:
    """One ranking out of several by the sum of 1 / (constant + rank) (Cormack, Clarke and Büttcher 2009)."""
    scores: dict[Hashable, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0.0) + 1 / (constant + rank)
    return sorted(scores, key=lambda id: -scores[id])
