"""Whole systems, ours against plain PyTorch and torch.compile: a training step of GMM-XLNet, a retrieval of Self-RAG.

Run as ``python -m memkern.benchmarks.systems.end_to_end [--json FILE]``. On a GPU the sizes are those of the base
model in bfloat16; on a CPU they are small, which shows that the program runs and nothing about speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from memkern.benchmarks import machine
from memkern.ops import cosine_topk, inverse_norms

ARMS = ("memkern", "pytorch", "compile")


@dataclass(frozen=True)
class Sizes:
    """What is run; ``base()`` on a GPU, ``tiny()`` elsewhere."""

    width: int
    layers: int
    heads: int
    batch: int
    tokens: int
    experts: int
    slots: int
    rows: int
    queries: int
    k: int
    dtype: str

    @staticmethod
    def base() -> Sizes:
        return Sizes(768, 12, 12, 32, 384, 4, 16, 1_000_000, 256, 8, "bfloat16")

    @staticmethod
    def tiny() -> Sizes:
        return Sizes(32, 2, 2, 2, 16, 4, 4, 2000, 8, 4, "float32")


@dataclass(frozen=True)
class Measured:
    """One arm of one system. ``rate`` in tokens/s or queries/s, ``peak_bytes`` of the device (None on a CPU)."""

    system: str
    arm: str
    seconds: float
    rate: float
    peak_bytes: int | None
    note: str = ""


def training_step(sizes: Sizes, device: str, repeats: int) -> list[Measured]:
    """Forward, loss, backward and AdamW of one segment with memory from the segment before."""
    from transformers import XLNetConfig, XLNetForQuestionAnsweringSimple

    from memkern.models.gmm_xlnet import GMMXLNetForQA

    dtype = getattr(torch, sizes.dtype)
    found = []
    for arm in ARMS:
        torch.manual_seed(0)
        config = XLNetConfig(
            vocab_size=32000 if device == "cuda" else 200, d_model=sizes.width, n_layer=sizes.layers,
            n_head=sizes.heads, d_inner=4 * sizes.width,
        )  # fmt: skip
        model: Any = GMMXLNetForQA(
            XLNetForQuestionAnsweringSimple(config), num_experts=sizes.experts, memory_slots=sizes.slots,
            memory_backend=None if arm == "memkern" else "reference",
        )  # fmt: skip
        model = model.to(device=device, dtype=dtype).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        ids = torch.randint(10, config.vocab_size, (sizes.batch, sizes.tokens), device=device)
        place = torch.randint(sizes.tokens, (sizes.batch,), device=device)
        state = model.detach(model(input_ids=ids).new_memory_state)
        called: Any = torch.compile(model) if arm == "compile" else model

        def step(
            called: Any = called,
            optimiser: Any = optimiser,
            ids: Tensor = ids,
            place: Tensor = place,
            state: Any = state,
        ) -> None:
            out = called(input_ids=ids, start_positions=place, end_positions=place, memory_state=state)
            out.loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        found.append(_measured("GMM-XLNet training step", arm, step, sizes.batch * sizes.tokens, device, repeats))
    return found


def retrieval(sizes: Sizes, device: str, repeats: int) -> list[Measured]:
    """The k nearest of all chunks for a batch of queries, as Self-RAG asks for them."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, sizes.dtype)
    rows = torch.randn(sizes.rows, sizes.width, generator=generator, device=device).to(dtype)
    queries = torch.randn(sizes.queries, sizes.width, generator=generator, device=device).to(dtype)
    norms = inverse_norms(rows)

    def plain(block: int = 1 << 16) -> Tensor:
        """Matrix product and top-k, block by block, as one writes it to stay within memory."""
        unit = torch.nn.functional.normalize(queries.float(), dim=1).to(dtype)
        best: Tensor | None = None
        for start in range(0, sizes.rows, block):
            part = rows[start : start + block]
            scores = (unit @ part.t()).float() * norms[start : start + block]
            top = scores.topk(min(sizes.k, scores.shape[1]), dim=1).values
            best = top if best is None else torch.cat([best, top], 1).topk(sizes.k, dim=1).values
        assert best is not None
        return best

    calls: dict[str, Callable[[], object]] = {
        "memkern": lambda: cosine_topk(queries, rows, sizes.k, inverse_norms=norms),
        "pytorch": plain,
        "compile": torch.compile(plain),
    }
    with torch.no_grad():
        return [_measured("retrieval", arm, call, sizes.queries, device, repeats) for arm, call in calls.items()]


def _measured(system: str, arm: str, call: Callable[[], object], units: int, device: str, repeats: int) -> Measured:
    try:
        for _ in range(2):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except Exception as error:  # an arm that cannot run is a result
        return Measured(system, arm, float("nan"), float("nan"), None, f"{type(error).__name__}: {error}"[:300])
    seconds = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return Measured(system, arm, seconds, units / seconds, peak)


def main(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU where there is one.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed repetitions, of which the median counts.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Run both systems and print a table."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes.base() if device == "cuda" else Sizes.tiny()
    found = training_step(sizes, device, repeats) + retrieval(sizes, device, repeats)
    facts = machine.machine(device)
    typer.echo(machine.line(facts))
    typer.echo(f"{asdict(sizes)}; wall time, median of {repeats}")
    for row in found:
        memory = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 2**30:.2f} GiB"
        typer.echo(
            f"  {row.system}, {row.arm}: {row.note or f'{1e3 * row.seconds:.2f} ms, {row.rate:.0f} a second{memory}'}"
        )
    if json_file is not None:
        content = {"schema": 1, "machine": facts, "sizes": asdict(sizes), "rows": [asdict(row) for row in found]}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
