"""The search over widths, numbers of rows and of queries: shares of this machine's limits, FAISS, and what k costs.

Run as ``python -m memkern.benchmarks.systems.search_sizes [--rows N ...] [--width D ...] [--json FILE]``.

Everything that is compared takes turns, one thread, in process CPU time, after its scores agreed with FAISS's (the k-th
best score is a number that both must find, whatever rows tie). Without faiss-cpu its column is empty, and the scores
are compared with those of a plain product.
"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from memkern.benchmarks import limits, machine
from memkern.benchmarks.timing import Call, cpu_times, one_thread
from memkern.ops import cosine_topk

_K, _LARGE_K = 10, 256
_SLOW = 1e8  # rows x queries from which on FAISS's plain loop, which it uses below 166 queries, takes a minute a turn


def _peer(database: Tensor) -> Any:
    """FAISS's flat index, or None."""
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database.numpy())
    return index


def _check(queries: Tensor, database: Tensor, index: Any) -> None:
    ours = cosine_topk(queries, database, _LARGE_K, backend="cpp").scores
    if index is None:
        theirs = (queries @ database.T).topk(_LARGE_K).values
    else:
        theirs = torch.from_numpy(index.search(queries.numpy(), _LARGE_K)[0])
    bound = 4 * (database.shape[1] + 2) * 2.0**-24
    error = (ours - theirs).abs().max().item()
    if error > bound:
        raise RuntimeError(f"scores differ by {error:.1e}, allowed {bound:.1e}: nothing was timed")


def measure(rows: int, width: int, counts: list[int], seconds: float) -> list[dict[str, float]]:
    """One line for each number of queries."""
    generator = torch.Generator().manual_seed(0)
    database = F.normalize(torch.randn(rows, width, generator=generator), dim=-1)
    index, found = _peer(database), []
    for count in counts:
        queries = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
        with one_thread():
            _check(queries[:4], database, index)
        calls: dict[str, Call] = {
            f"k{k}": partial(cosine_topk, queries, database, k, backend="cpp") for k in (_K, _LARGE_K)
        }
        if index is not None and (rows * count < _SLOW or count >= 256):
            calls["faiss"] = partial(index.search, queries.numpy(), _K)
        beside = limits.Beside(("read", "peak"), [database])
        times = cpu_times(calls | beside.calls, seconds=seconds, rounds=9)
        rates, _ = beside.take(times)
        own = times[f"k{_K}"].least
        line = {
            "rows": rows, "width": width, "queries": count, "seconds": own,
            "read": database.nbytes / rates["read"] / own,
            "peak": 2.0 * rows * width * count / rates["peak"] / own,
            "large_k": times[f"k{_LARGE_K}"].least / own,
        }  # fmt: skip
        if "faiss" in times:
            line["faiss"] = times["faiss"].least / own
        found.append(line)
    return found


def cells(line: dict[str, float]) -> list[str]:
    """A row of the table under :data:`HEADER`."""
    faiss = f"{line['faiss']:.2f}x" if "faiss" in line else "-"
    return [
        f"{line['width']:.0f}", f"{line['rows']:,.0f}", f"{line['queries']:.0f}", f"{1e3 * line['seconds']:.2f} ms",
        f"{line['read']:.0%}", f"{line['peak']:.0%}", faiss, f"{line['large_k']:.2f}",
    ]  # fmt: skip


HEADER = ["width", "rows", "queries", "k = 10", "of read", "of FMA peak", "vs FAISS", f"k = {_LARGE_K} costs"]


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the database; 100,000 and 1,000,000.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Widths; 128, 384 and 768.")] = None,
    queries: Annotated[list[int] | None, typer.Option(help="Numbers of queries; 1, 16, 128 and 256.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long each contestant runs.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Time the search of float32 rows at every combination of the sizes."""
    facts = machine.machine("cpu")
    typer.echo(machine.line(facts))
    found: list[dict[str, float]] = []
    for d in width or [128, 384, 768]:
        for n in rows or [100_000, 1_000_000]:
            for line in measure(n, d, queries or [1, 16, 128, 256], seconds):
                found.append(line)
                typer.echo("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, cells(line), strict=True)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"schema": 1, "machine": facts, "k": _K, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
