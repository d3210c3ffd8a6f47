"""Times of calls: process CPU time on the CPU, device time on a GPU.

On a shared machine wall time says little, so that the CPU is timed in process CPU time at one thread, the contestants
taking turns. On a GPU the inputs rotate through more memory than the L2 cache holds, and a call is timed inside a CUDA
graph, where the host's launches do not count; what cannot be captured is timed launch by launch and marked.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from . import machine

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Quantiles of one call in seconds; ``how``: "cpu", "graph" or "events"."""

    p20: float
    p50: float
    p80: float
    least: float
    calls: int
    how: str

    @staticmethod
    def of(seconds: Sequence[float], how: str) -> Times:
        ordered = sorted(seconds)

        def quantile(q: float) -> float:
            return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]

        return Times(quantile(0.2), quantile(0.5), quantile(0.8), ordered[0], len(ordered), how)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, the garbage collector off."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def cpu_times(calls: Mapping[str, Call], *, seconds: float = 0.5, rounds: int = 15) -> dict[str, Times]:
    """Process CPU time of each call, the calls taking turns in ``rounds`` rounds.

    Args:
        calls: by name.
        seconds: about how long each of them runs in all.
        rounds: how often the turn comes round at most.
    """
    module = machine.compiled_module()
    measure = module.process_cpu_times if module else _process_cpu_times
    found: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread():
        per_round: dict[str, int] = {}
        for name, call in calls.items():
            call()
            once = min(measure(call, 1)[0] for _ in range(2)) / 1e9
            per_round[name] = max(1, min(1000, int(seconds / rounds / max(once, 1e-7))))
        slowest = max((min(measure(call, 1)) / 1e9 for call in calls.values()), default=0.0)
        for _ in range(max(5, min(rounds, int(rounds * seconds / max(slowest * rounds, 1e-9))))):
            for name, call in calls.items():
                # A virtual machine's clock of processor time stands still at times: such a sample says nothing.
                found[name] += [elapsed / 1e9 for elapsed in measure(call, per_round[name]) if elapsed > 0]
    return {name: Times.of(elapsed, "cpu") for name, elapsed in found.items()}


def _process_cpu_times(call: Call, count: int) -> list[int]:
    times = []
    for _ in range(count):
        start = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - start)
    return times


def cuda_times(calls: Mapping[str, Sequence[Call]], *, seconds: float = 0.3, graphs: bool = True) -> dict[str, Times]:
    """Device time of each call, the calls taking turns.

    Args:
        calls: by name the same call on several sets of inputs, which take turns so that none is found in the cache.
        seconds: about how long each of them runs in all.
        graphs: False times launch by launch.
    """
    prepared: dict[str, tuple[Call, int, str]] = {}
    for name, variants in calls.items():
        graph = _captured(variants) if graphs else None
        prepared[name] = (graph, len(variants), "graph") if graph else (_in_turn(variants), len(variants), "events")
    found: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for name, (run, _, _) in prepared.items():
        once = min(_event_time(run) for _ in range(2))
        repeats[name] = max(5, min(200, int(seconds / max(once, 1e-7))))
    for turn in range(max(repeats.values(), default=0)):
        for name, (run, count, _) in prepared.items():
            if turn < repeats[name]:
                found[name].append(_event_time(run) / count)
    return {name: Times.of(elapsed, prepared[name][2]) for name, elapsed in found.items()}


def _in_turn(variants: Sequence[Call]) -> Call:
    def run() -> None:
        for variant in variants:
            variant()

    return run


def _event_time(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Work in front of the first event, so that the host is ahead of the device when the timed launches come.
    torch.cuda._sleep(200_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _captured(variants: Sequence[Call]) -> Call | None:
    """A replay of all the calls as one graph, or None where they cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                _in_turn(variants)()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _in_turn(variants)()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def rotations(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs of this size overflow the L2 cache twice; at least 1, at most 32."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return max(1, min(32, math.ceil(2 * cache / max(bytes_of_one, 1))))


def peak_memory(call: Call) -> int:
    """Bytes that a call allocates at most on the GPU above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
