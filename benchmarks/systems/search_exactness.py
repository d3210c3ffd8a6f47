"""Holds the search to a float64 brute force on large databases: random, clustered, duplicated, adversarial rows.

Run as ``python -m memkern.benchmarks.systems.search_exactness [--rows N] [--width D] [--json FILE]``.

A neighbour is wrong when a row was left out whose true score beats that of an included one by more than
2 (D + 2) 2^-24. Every batch is also searched in two other batchings, whose bits must be the same. Prints a line for
each database, dtype and batch, and fails when one neighbour is wrong or one bit is another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from memkern.benchmarks import machine
from memkern.ops import cosine_topk
from memkern.ops.cosine_topk import TopK

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


@dataclass(frozen=True)
class Verdict:
    """One search of one database. ``seconds``: process CPU time."""

    database: str
    dtype: str
    queries: int
    wrong: int
    other_bits: int
    seconds: float


def wrong_neighbours(queries: Tensor, database: Tensor, searches: Sequence[TopK]) -> list[int]:
    """For each search, of the first so many queries: rows left out although they truly beat an included one."""
    q = torch.nn.functional.normalize(queries.double(), dim=-1)

    def cosines(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.double(), dim=-1)

    margin = 2 * (queries.shape[1] + 2) * 2.0**-24
    owns = [(q[: len(i), None] * cosines(database[i])).sum(-1) for _, i in searches]
    worst = [own.amin(1, keepdim=True) for own in owns]
    # Included rows may be among those above the worst one.
    wrong = [-(own - least > margin).sum(1) for own, least in zip(owns, worst, strict=True)]
    for start in range(0, database.shape[0], 1 << 15):
        scores = q @ cosines(database[start : start + (1 << 15)]).T
        for i, least in enumerate(worst):
            wrong[i] += (scores[: len(least)] - least > margin).sum(1)
    return [int(beaten.clamp(min=0).sum()) for beaten in wrong]


def _other_bits(found: TopK, queries: Tensor, database: Tensor, k: int, backend: str | None) -> int:
    """Results that change when the queries are searched in batches of another size."""
    changed = 0
    for size in {1 if len(queries) <= 4 else 3, max(1, (len(queries) + 1) // 2)} - {len(queries)}:
        parts = [cosine_topk(part, database, k, backend=backend) for part in queries.split(size)]
        scores, indices = (torch.cat(x) for x in zip(*parts, strict=True))
        changed += int(((scores != found.scores) | (indices != found.indices)).sum())
    return changed


def check(rows: int, width: int, counts: tuple[int, ...], k: int, backend: str | None = None) -> Iterator[Verdict]:
    """The verdict on every database, dtype and batch."""
    for name, make in DATABASES.items():
        made = make(max(counts), rows, width, torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            queries, database = (x.to(dtype) for x in made)
            searches, seconds = [], []
            for count in counts:
                start = time.process_time()
                searches.append(cosine_topk(queries[:count], database, k, backend=backend))
                seconds.append(time.process_time() - start)
            wrong = wrong_neighbours(queries, database, searches)
            for count, found, bad, spent in zip(counts, searches, wrong, seconds, strict=True):
                changed = _other_bits(found, queries[:count], database, k, backend)
                yield Verdict(name, str(dtype).removeprefix("torch."), count, bad, changed, spent)


def main(
    rows: Annotated[int, typer.Option(help="Of each database.")] = 1_000_000,
    width: Annotated[int, typer.Option(help="Of the rows.")] = 64,
    queries: Annotated[list[int] | None, typer.Option(help="Size of a batch; give it several times.")] = None,
    k: Annotated[int, typer.Option(help="Neighbours of each query.")] = 10,
    backend: Annotated[str | None, typer.Option(help="The default: what the library chooses here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Search every database in every batch, and compare."""
    found = []
    for verdict in check(rows, width, tuple(queries or (1, 32, 300)), k, backend):
        found.append(verdict)
        typer.echo(
            f"{verdict.database:12} {verdict.dtype:9} {verdict.queries:5} queries x {rows:,} rows of {width}, k = {k}: "
            f"{verdict.wrong} wrong, {verdict.other_bits} other bits, {verdict.seconds:.3f} s CPU"
        )
    if json_file is not None:
        content = {
            "schema": 1,
            "machine": machine.machine("cpu"),
            "rows": rows,
            "width": width,
            "k": k,
            "results": [asdict(verdict) for verdict in found],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    if any(verdict.wrong or verdict.other_bits for verdict in found):
        raise SystemExit("the search is not exact")


if __name__ == "__main__":
    typer.run(main)
