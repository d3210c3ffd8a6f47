"""A MemoryStore with a million chunks: how long it takes to add, search, save and load them, and how large they are.

Run as ``python -m memkern.benchmarks.systems.store [--chunks N] [--width D] [--json FILE]``.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from memkern.benchmarks import machine
from memkern.store import MemoryStore

_BATCH = 16384


class Stopwatch:
    """Seconds of named calls."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any], repeats: int = 1) -> Any:
        """Run ``call``, keep the least of its times under ``name``, and return what it returned last."""
        result = None
        for _ in range(repeats):
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            self.found[name] = min(elapsed, self.found.get(name, elapsed))
        return result


def measure(chunks: int, width: int, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    """Seconds and bytes of each step, on random unit rows with texts of some hundred characters."""
    watch = Stopwatch()
    queries = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    expected = _write(watch, chunks, width, dtype, folder, queries)
    loaded = watch("load_seconds", partial(MemoryStore.load, folder))
    if _answers(loaded, queries[1]) != expected:
        raise RuntimeError("the loaded store answers differently")
    mapped = watch("load_mapped_seconds", partial(MemoryStore.load, folder, mmap=True))
    watch("search_1_after_mapping_seconds", partial(mapped.search, queries[0], 10))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return watch.found | {"file_bytes": float(sum(sizes)), "peak_rss_bytes": peak}


def _write(
    watch: Stopwatch, chunks: int, width: int, dtype: torch.dtype, folder: Path, queries: Tensor
) -> list[tuple[int, float]]:
    """Fill, search and save a store; what it answers to the second query."""
    store = MemoryStore(width, chunks, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    text = "A passage of text that stands for what a user would store in a chunk, some hundred characters. " * 2

    def fill() -> None:
        for start in range(0, chunks, _BATCH):
            count = min(_BATCH, chunks - start)
            rows = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
            store.add_batch([f"{start + i}: {text}" for i in range(count)], rows)

    watch("add_seconds", fill)
    watch("search_1_seconds", partial(store.search, queries[0], 10), repeats=5)
    watch("search_64_seconds", partial(store.search_batched, queries, 10), repeats=3)
    watch("save_seconds", partial(store.save, folder))
    return _answers(store, queries[1])


def _answers(store: MemoryStore, query: Tensor) -> list[tuple[int, float]]:
    return [(hit.id, hit.score) for hit in store.search(query, 10)]


def main(
    chunks: Annotated[int, typer.Option(help="How many chunks.")] = 1_000_000,
    width: Annotated[int, typer.Option(help="Width of the embeddings.")] = 384,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Fill, search, save and load a store, and print wall times and sizes."""
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(chunks, width, getattr(torch, dtype), Path(scratch) / "store")
    facts = machine.machine("cpu")
    typer.echo(f"{chunks} chunks of width {width}, {dtype}; wall time, {torch.get_num_threads()} threads")
    typer.echo(machine.line(facts))
    for name, value in found.items():
        unit = f"{value / 2**30:.2f} GiB" if name.endswith("bytes") else f"{value:.3f} s"
        typer.echo(f"  {name.rsplit('_', 1)[0].replace('_', ' ')}: {unit}")
    if json_file is not None:
        content = {
            "schema": 1,
            "machine": facts,
            "chunks": chunks,
            "width": width,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "results": found,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
