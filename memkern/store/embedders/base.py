"""What a store's users expect of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

KINDS = ("document", "query")


class Embedder(Protocol):
    """Maps texts to unit rows; queries and documents may be prompted differently."""

    @property
    def d_model(self) -> int: ...

    def encode(self, texts: str | Sequence[str], kind: str = "document") -> Tensor:
        """(n,) texts -> (n, d_model) float32, rows of length 1 (a text without content gives zeros).

        One text that stands in no list gives its row, (d_model,).
        """
        ...


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
