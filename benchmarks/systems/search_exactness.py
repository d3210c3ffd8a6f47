"""Holds the search to a float64 brute force on large databases: random, clustered, duplicated, adversarial rows.

    python -m memkern.benchmarks.systems.search_exactness --rows 1000000

A neighbour is wrong when a row was left out whose true score beats that of an included one by more than
2 (D + 2) 2^-24. Prints a line for each database and dtype, and fails when one neighbour is wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memkern.ops import cosine_topk

Maker = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]


def _random(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width, generator=g), torch.randn(rows, width, generator=g)


def _clustered(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A hundred tight clusters, with queries inside of them."""
    centres = torch.randn(100, width, generator=g)
    database = centres[torch.randint(0, 100, (rows,), generator=g)] + 0.01 * torch.randn(rows, width, generator=g)
    queries = centres[torch.arange(count) % 100] + 0.01 * torch.randn(count, width, generator=g)
    return queries, database


def _duplicated(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A thousand rows, each many times: equal scores go to the lower index."""
    few = torch.randn(min(rows, 1000), width, generator=g)
    return torch.randn(count, width, generator=g), few[torch.randint(0, few.shape[0], (rows,), generator=g)]


def _rising(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every row is better than all before it."""
    base = torch.randn(width, generator=g)
    noise = torch.randn(rows, width, generator=g)
    level = torch.linspace(-1, 3, rows)[:, None]
    return base + 0.01 * torch.randn(count, width, generator=g), level * base + noise


def _near_ties(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows within a few roundings of one another, in every format that a pass may scan in."""
    base = torch.randn(width, generator=g)
    steps = 2.0 ** torch.randint(-24, -8, (rows, 1), generator=g)
    return base + 0.3 * torch.randn(count, width, generator=g), base * (
        1 + steps * torch.randn(rows, width, generator=g)
    )


def _lengths(count: int, rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows whose lengths differ by twelve orders of magnitude, and zero rows."""
    queries, database = _random(count, rows, width, g)
    scale = 10.0 ** (12 * torch.rand(rows, 1, generator=g) - 6)
    return queries, torch.where(torch.rand(rows, 1, generator=g) < 0.01, 0.0, database * scale)


DATABASES: dict[str, Maker] = {
    "random": _random,
    "clustered": _clustered,
    "duplicated": _duplicated,
    "rising": _rising,
    "near ties": _near_ties,
    "lengths": _lengths,
}


def wrong_neighbours(queries: Tensor, database: Tensor, k: int, backend: str | None = None) -> int:
    """Rows that the search left out although they truly beat an included one."""
    found = cosine_topk(queries, database, k, backend=backend)
    q = torch.nn.functional.normalize(queries.double(), dim=-1)

    def cosines(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.double(), dim=-1)

    own = (q[:, None] * cosines(database[found.indices])).sum(-1)
    margin = 2 * (queries.shape[1] + 2) * 2.0**-24
    worst = own.amin(1, keepdim=True)
    beaten = torch.zeros(queries.shape[0], dtype=torch.int64)
    for start in range(0, database.shape[0], 1 << 16):
        scores = q @ cosines(database[start : start + (1 << 16)]).T
        beaten += (scores - worst > margin).sum(1)
    # Included rows may be among those above the worst one.
    included = (own - worst > margin).sum(1)
    return int((beaten - included).clamp(min=0).sum())


def check(
    rows: int, width: int, counts: tuple[int, ...], k: int, backend: str | None = None
) -> Iterator[tuple[str, str, int, int, float]]:
    """(database, dtype, queries, wrong neighbours, seconds of one search) for every database, dtype and batch."""
    for name, make in DATABASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for count in counts:
                queries, database = make(count, rows, width, torch.Generator().manual_seed(0))
                queries, database = queries.to(dtype), database.to(dtype)
                start = time.process_time()
                cosine_topk(queries, database, k, backend=backend)
                seconds = time.process_time() - start
                wrong = wrong_neighbours(queries, database, k, backend)
                yield name, str(dtype).removeprefix("torch."), count, wrong, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--queries", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--backend")
    options = parser.parse_args()
    total = 0
    for name, dtype, count, wrong, seconds in check(
        options.rows, options.width, tuple(options.queries), options.k, options.backend
    ):
        total += wrong
        print(f"{name:12} {dtype:9} {count:5} queries x {options.rows:,} rows: {wrong} wrong, {seconds:.3f} s CPU")
    if total:
        raise SystemExit(f"{total} wrong neighbours")


if __name__ == "__main__":
    main()
