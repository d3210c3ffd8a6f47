"""A training step of GMM-XLNet at base size: its memory part against plain modules, and the whole step against XLNet.

The memory part is what the model does beside the encoder and the head: read the experts, route what was written, update
them, read them again; forward and backward, to every parameter, state and written slot. The plain modules do the same
with one Linear per expert and gate, as they are written by hand. Process CPU time at one thread, the contestants taking
turns. Beside the times of the memory part stands what the products alone would take at the peak of the FMA units.

Run as ``python -m memkern.benchmarks.systems.gmm_step [--part memory|step|both] [--json FILE]``. A file of the same
settings keeps its results of the part that is not run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from memkern.benchmarks import limits, machine
from memkern.benchmarks.timing import cpu_times

WIDTH, SLOTS = 768, 16


class PlainMemory(nn.Module):
    """The memory part in plain PyTorch: a Linear per expert and gate, and every product on its own."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.routing_projection = nn.Linear(WIDTH, experts)
        self.gate_networks = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(experts))
        self.update_networks = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(experts))

    def route(self, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = written.mean(1)
        logits = self.routing_projection(pooled).clamp(-10, 10)
        experts = logits.shape[1]
        zero = (pooled.abs() < 1e-10).all(1, keepdim=True)
        probs = torch.where(zero, torch.full_like(logits, 1 / experts), torch.softmax(logits, -1))
        entropy = -(probs * torch.log(probs + 1e-10)).sum(-1)
        first = probs.argmax(-1)
        shares = torch.stack([(first == index).float().mean() for index in range(experts)])
        return probs, entropy, experts * (shares * probs.mean(0)).sum()

    @staticmethod
    def read(states: list[Tensor], probs: Tensor) -> Tensor:
        return (torch.stack(states, 1) * probs[:, :, None, None]).sum(1)

    def forward(self, states: list[Tensor], read_probs: Tensor, written: Tensor) -> list[Tensor]:
        incoming = self.read(states, read_probs)
        probs, entropy, balance = self.route(written)
        updated = []
        for index, state in enumerate(states):
            both = torch.cat([state, written], -1)
            gate = torch.sigmoid(self.gate_networks[index](both))
            update = torch.tanh(self.update_networks[index](both))
            share = probs[:, index, None, None] * gate
            updated.append(share * update + (1 - share) * state)
        return [incoming, entropy, balance, self.read(updated, probs), *updated]


class OurMemory(nn.Module):
    """The same through memkern's modules, with the plain modules' weights."""

    def __init__(self, plain: PlainMemory) -> None:
        super().__init__()
        from memkern.nn import AggregatedMemoryReader, ExpertUpdater, MemoryGatingNetwork

        experts = len(plain.gate_networks)
        self.router = MemoryGatingNetwork(WIDTH, experts, max_experts=experts)
        self.updater = ExpertUpdater(WIDTH, experts, max_experts=experts)
        self.reader = AggregatedMemoryReader(WIDTH, experts, max_experts=experts)
        self.router.routing_projection.load_state_dict(plain.routing_projection.state_dict())
        self.updater.load_state_dict({name: p for name, p in plain.state_dict().items() if "networks" in name})

    def forward(self, states: list[Tensor], read_probs: Tensor, written: Tensor) -> list[Tensor]:
        stacked = torch.stack(states, 1)
        incoming = self.reader.aggregate(stacked, read_probs)
        routing = self.router.route(written)
        updated = self.updater.update(stacked, written, routing.probs)
        read = self.reader.aggregate(updated, routing.probs)
        return [incoming, routing.entropy, routing.load_balance_loss, read, *updated.unbind(1)]


def memory_part(experts: int, batch: int, seconds: float) -> dict[str, float]:
    """Least CPU seconds of forward and backward, plain and ours; they have to agree first."""
    torch.manual_seed(0)
    plain = PlainMemory(experts)
    ours = OurMemory(plain)
    states = [torch.randn(batch, SLOTS, WIDTH, requires_grad=True) for _ in range(experts)]
    written = torch.randn(batch, SLOTS, WIDTH, requires_grad=True)
    probs = torch.softmax(torch.randn(batch, experts), -1)
    cotangents = [torch.randn_like(out) for out in plain(states, probs, written)]

    def step(module: nn.Module) -> Callable[[], None]:
        leaves = [*module.parameters(), *states, written]

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(module(states, probs, written), cotangents)

        return run

    calls = {"plain": step(plain), "memkern": step(ours)}
    grads = []
    for run in calls.values():
        run()
        grads.append([leaf.grad for leaf in (*states, written)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    return {name: times.least for name, times in cpu_times(calls, seconds=seconds).items()}


def least_possible(experts: int, batch: int) -> float | None:
    """CPU seconds of the memory part's products at the measured peak: two weights (D, 2D) an expert, forward and both
    gradients; None without the loop that measures it."""
    peak = limits.measure("cpu").get("peak")
    flops = 3 * 2 * 2 * (batch * SLOTS) * WIDTH * (2 * WIDTH) * experts
    return None if peak is None else flops / peak


def whole_step(experts: list[int], batch: int, length: int, layers: int, rounds: int) -> dict[str, float]:
    """Least CPU seconds of a training step (forward and backward) of XLNet and of GMM-XLNet, ``length`` tokens each.

    For GMM-XLNet the length includes its memory tokens, so that both encoders see as many.
    """
    from transformers import XLNetConfig, XLNetForQuestionAnsweringSimple

    from memkern.models import GMMXLNetForQA

    torch.manual_seed(0)
    config = XLNetConfig(d_model=WIDTH, n_layer=layers, n_head=12, d_inner=4 * WIDTH, vocab_size=32000)
    base = XLNetForQuestionAnsweringSimple(config).train()

    def step(model: Any, tokens: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(1)
        inputs = {
            "input_ids": torch.randint(10, 32000, (batch, tokens), generator=generator),
            "attention_mask": torch.ones(batch, tokens),
            "token_type_ids": torch.zeros(batch, tokens, dtype=torch.long),
            "start_positions": torch.zeros(batch, dtype=torch.long),
            "end_positions": torch.ones(batch, dtype=torch.long),
        }

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()

        return run

    calls = {"XLNet": step(base, length)}
    for count in experts:
        model = GMMXLNetForQA(base, count, SLOTS, max_experts=max(8, count))
        calls[f"GMM-XLNet, {count} experts"] = step(model, length - 2 * SLOTS)
    least: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for name, run in calls.items():
                start = time.process_time()
                run()
                elapsed = time.process_time() - start
                least[name] = min(elapsed, least.get(name, elapsed))
    finally:
        torch.set_num_threads(threads)
    return least


def main(
    experts: Annotated[list[int] | None, typer.Option(help="Numbers of experts; 4 and 16 by default.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a segment, memory tokens among them.")] = 384,
    layers: Annotated[int, typer.Option(help="Layers of XLNet; 12 at base size.")] = 12,
    rounds: Annotated[int, typer.Option(help="Turns of the whole step.")] = 2,
    seconds: Annotated[float, typer.Option(help="About how long each memory part is timed.")] = 6.0,
    part: Annotated[str, typer.Option(help="memory, step or both.")] = "both",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Time the memory part and the whole step, and print one table each."""
    counts = experts or [4, 16]
    facts = machine.machine("cpu")
    typer.echo(machine.line(facts))
    typer.echo(f"width {WIDTH}, {SLOTS} slots, batch {batch}; process CPU time, 1 thread, forward and backward")
    rows: list[dict[str, Any]] = []
    if part in ("memory", "both"):
        typer.echo("memory part                    plain      memkern    speedup   products at peak")
        for count in counts:
            found = memory_part(count, batch, seconds)
            ratio = found["plain"] / found["memkern"]
            limit = least_possible(count, batch)
            rows.append({"part": "memory", "experts": count, "seconds": found, "speedup": ratio, "limit": limit})
            times = f"{1e3 * found['plain']:8.1f} ms{1e3 * found['memkern']:9.1f} ms"
            at_peak = "-" if limit is None else f"{1e3 * limit:.1f} ms"
            typer.echo(f"  {count:2d} experts               {times}  {ratio:6.2f}x   {at_peak:>10s}")
    if part in ("step", "both"):
        least = whole_step(counts, batch, length, layers, rounds)
        typer.echo(f"whole step, {layers} layers, {length} tokens      time      share")
        for name, value in least.items():
            ratio = value / least["XLNet"]
            rows.append({"part": "step", "model": name, "seconds": value, "ratio_to_base": ratio})
            typer.echo(f"  {name:27s}{value:9.2f} s  {ratio:8.3f}x")
    if json_file is not None:
        settings = {"batch": batch, "length": length, "layers": layers, "width": WIDTH, "slots": SLOTS, "threads": 1}
        if json_file.exists():
            old = json.loads(json_file.read_text())
            ran = {row["part"] for row in rows}
            kept = [row for row in old["results"] if row["part"] not in ran and old["settings"] == settings]
            rows = sorted([*kept, *rows], key=lambda row: str(row["part"]))
        content = {"schema": 1, "machine": facts, "settings": settings, "results": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
