"""Position recall: n facts in a row, one of them asked; does the answer depend on where the fact stood?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAD, MEM, SEP, STORE, RECALL, EQUALS = range(6)
_SPECIALS = ("<pad>", "[MEM]", "[SEP]", "STORE", "RECALL", "=")


class PositionRecall(NamedTuple):
    """B streams of N facts "STORE key = value", each with one question "RECALL key =".

    Tokens: :data:`PAD`, :data:`MEM`, :data:`SEP`, :data:`STORE`, :data:`RECALL`, :data:`EQUALS`, then the keys, then
    the values. Keys differ within a stream; values may come again.
    """

    facts: Tensor  # (B, N, 4) int64 token ids: STORE, key, EQUALS, value
    query: Tensor  # (B, 3) int64 token ids: RECALL, key, EQUALS
    answer: Tensor  # (B,) int64 token id of the value
    position: Tensor  # (B,) int64 in [0, N), which fact is asked
    first_value: int  # token id of value 0; keys start at len(specials)
    values: int  # how many values there are; a blind guess is right once in so many

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.first_value + self.values

    def text(self, tokens: Tensor) -> str:
        """Tokens in words: keys as three letters, values as four digits."""
        return " ".join(self._word(int(token)) for token in tokens)

    def _word(self, token: int) -> str:
        if token < len(_SPECIALS):
            return _SPECIALS[token]
        if token < self.first_value:
            key = token - len(_SPECIALS)
            return "".join(chr(ord("A") + key // 26**place % 26) for place in (2, 1, 0))
        return f"{1000 + token - self.first_value:04d}"


def position_recall(
    count: int,
    facts: int = 32,
    *,
    keys: int = 64,
    values: int = 16,
    position: int | Tensor | None = None,
    seed: int = 0,
) -> PositionRecall:
    """Streams of facts with a question each.

    Args:
        count: streams B.
        facts: facts N in a stream, at most ``keys``.
        keys, values: how many of each there are; chance is 1 / ``values``.
        position: which fact is asked, an int or (B,) int64 in [0, N); None asks each position equally often: row b
            asks position b mod N.
        seed: everything is drawn from it.

    Raises:
        ValueError: a size or position out of range.
    """
    for name, given, least, most in (
        ("count", count, 0, None),
        ("keys", keys, 1, 26**3),
        ("values", values, 2, 9000),
        ("facts", facts, 1, keys),
    ):
        if given < least or (most is not None and given > most):
            raise ValueError(f"{name}: expected {least} to {most or 'any number'}, got {given}")
    asked = torch.arange(count) % facts
    if position is not None:
        asked = torch.as_tensor(position, dtype=torch.int64).expand(count).clone()
        if count and not (int(asked.min()) >= 0 and int(asked.max()) < facts):
            raise ValueError(f"position: expected values in [0, {facts}), got {position}")
    draw = torch.Generator().manual_seed(seed)
    first_key, first_value = len(_SPECIALS), len(_SPECIALS) + keys
    key = first_key + torch.rand(count, keys, generator=draw).argsort(1)[:, :facts]
    value = first_value + torch.randint(values, (count, facts), generator=draw)
    store, equals = torch.full_like(key, STORE), torch.full_like(key, EQUALS)
    rows = torch.arange(count)
    wanted = key[rows, asked]
    return PositionRecall(
        facts=torch.stack((store, key, equals, value), dim=-1),
        query=torch.stack((torch.full_like(wanted, RECALL), wanted, torch.full_like(wanted, EQUALS)), dim=-1),
        answer=value[rows, asked],
        position=asked,
        first_value=first_value,
        values=values,
    )
