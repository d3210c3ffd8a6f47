"""An embedder without a model: words and word pairs, hashed into signed buckets (Weinberger et al. 2009).

The same text gives the same vector on every machine. :meth:`HashingEmbedder.fit` adds inverse document frequencies,
with which cosine search comes close to a lexical ranking.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import torch
from torch import Tensor

from memkern.store.embedders.base import check_kind

_WORD = re.compile(r"\w+")


@lru_cache(maxsize=1 << 18)
def _hash(feature: str) -> int:
    # Python's own hash differs from process to process.
    return int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "little")


class HashingEmbedder:
    """Feature hashing of lower-cased words, their five-letter beginnings and neighbouring pairs.

    Args:
        d_model: number of buckets.
    """

    def __init__(self, d_model: int = 1024) -> None:
        if d_model < 1:
            raise ValueError(f"d_model: expected at least 1, got {d_model}")
        self._d_model = d_model
        self._frequencies: Counter[str] = Counter()
        self._documents = 0

    @property
    def d_model(self) -> int:
        return self._d_model

    def fit(self, texts: Iterable[str]) -> HashingEmbedder:
        """Count in how many texts each feature occurs; rarer features then weigh more. Returns itself."""
        for text in texts:
            self._frequencies.update(set(self._features(text)))
            self._documents += 1
        return self

    def encode(self, texts: str | Sequence[str], kind: str = "document") -> Tensor:
        """(n,) texts -> (n, d_model) float32 unit rows; zeros for a text without words."""
        check_kind(kind)
        if isinstance(texts, str):
            return self.encode([texts], kind)[0]
        rows = torch.zeros(len(texts), self._d_model, dtype=torch.float32, device="cpu")
        for row, text in enumerate(texts):
            buckets: dict[int, float] = {}
            for feature, count in self._features(text).items():
                number = _hash(feature)
                sign = 1.0 if number >> 63 else -1.0
                bucket = number % self._d_model
                buckets[bucket] = buckets.get(bucket, 0.0) + sign * (1 + math.log(count)) * self._weight(feature)
            if buckets:
                weights = torch.tensor(list(buckets.values()), dtype=torch.float32, device="cpu")
                rows[row, torch.tensor(list(buckets), device="cpu")] = weights
        return torch.nn.functional.normalize(rows, dim=1)

    def _weight(self, feature: str) -> float:
        if not self._documents:
            return 1.0
        return math.log(1 + (self._documents + 0.5) / (self._frequencies.get(feature, 0) + 0.5))

    @staticmethod
    def _features(text: str) -> Counter[str]:
        words = _WORD.findall(text.lower())
        found = Counter(words)
        # Beginnings join the inflections of a word; they are marked so that they do not collide with short words.
        found.update(f"{word[:5]}~" for word in words if len(word) > 5)
        found.update(f"{a} {b}" for a, b in pairwise(words))
        return found
