"""What a closed retrieval gate saves: a hybrid model with its gate open, closed, and without an external memory.

Run as ``python -m memkern.benchmarks.systems.retrieval_gate [--json FILE]``. Arms take turns, each time is the least of
many, and CPU times are those of the process, so that neighbours on the machine disturb little.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from memkern.benchmarks import machine
from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel

ARMS = ("gate open", "gate closed", "no external memory")
SEARCH, ATTENTION = "cosine_topk", "retrieved_attention"


def build(device: str) -> HybridTransformerModel:
    """A Llama of four layers with a bank of 16,384 tokens; larger on a GPU."""
    torch.manual_seed(0)
    width = 1024 if device == "cuda" else 256
    text = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    config = HybridTransformerConfig(
        text, use_internal_memory=False, external_memory_size=16384, num_retrieval_layers=4, use_gated_retrieval=True
    )
    model = HybridTransformerModel(config).eval()
    torch.nn.Module.to(model, torch.device(device))
    for _ in range(16):
        model.write_external_memory(torch.randint(1, 8192, (1, 1024), device=device))
    return model


def call(model: HybridTransformerModel, arm: str, ids: torch.Tensor) -> None:
    """One forward of an arm."""
    model.external_memory.set_threshold(0.0 if arm == "gate open" else 1.0)
    model.reset_gates()
    with torch.no_grad():
        model(ids, use_external_memory=arm != "no external memory", use_cache=False)


def names(model: HybridTransformerModel, arm: str, ids: torch.Tensor) -> list[str]:
    """Search and retrieval attention among what a profile of the arm shows."""
    call(model, arm, ids)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ids.is_cuda else [])]
    with profile(activities=activities) as trace:
        call(model, arm, ids)
    keys = {event.key for event in trace.key_averages()}
    return sorted(name for name in (SEARCH, ATTENTION) if any(name in key for key in keys))


def seconds(model: HybridTransformerModel, arm: str, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(model, arm, ids)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call(model, arm, ids)
    return time.process_time() - start


def measure(repeats: int) -> dict[str, Any]:
    """Times of every arm, their ratios to the model without external memory, and what their profiles show."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(device)
    ids = torch.randint(1, 8192, (4, 128), device=device)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        call(model, arm, ids)
    near = ARMS[1:]
    for repeat in range(repeats):
        # The two that are compared take turns in being first; the open gate, far above both, is timed less often.
        for arm in (*near[repeat % 2 :], *near[: repeat % 2], *(ARMS[:1] if repeat % 20 == 0 else ())):
            times[arm].append(seconds(model, arm, ids))
    base = min(times["no external memory"])
    rounds = zip(times["gate closed"], times["no external memory"], strict=True)
    return {
        "machine": machine.line(machine.machine(device)),
        "shape": {"rows": 4, "tokens": 128, "bank_tokens": model.external_memory.get_size(), "retrieving_layers": 4},
        "clock": "wall" if device == "cuda" else "process",
        "repeats": repeats,
        "milliseconds": {arm: 1000 * min(values) for arm, values in times.items()},
        "ratio": {arm: min(values) / base for arm, values in times.items()},
        "median_paired_ratio_closed": statistics.median(closed / none for closed, none in rounds),
        "profile": {arm: names(model, arm, ids) for arm in ARMS},
    }


def main(
    repeats: Annotated[int, typer.Option(help="Rounds of all arms.", min=1)] = 40,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Measure, print, and write where asked."""
    torch.set_num_threads(1)
    found = measure(repeats)
    text = json.dumps(found, indent=1)
    typer.echo(text)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
