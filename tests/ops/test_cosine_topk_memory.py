"""The search never holds Q x N: resident memory of a process before and after, against the stated bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import memkern

PROGRAM = """
import os, sys, torch
from pathlib import Path
from memkern.ops import cosine_topk

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

def search(count, rows, width, k):
    queries, database = torch.randn(count, width), torch.randn(rows, width)
    cosine_topk(queries[:3], database[:100], k, backend="cpp")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    found = cosine_topk(queries, database, k, backend="cpp")
    print(peak() - before - found.scores.nbytes - found.indices.nbytes, flush=True)

for line in sys.argv[1:]:
    threads, *sizes = map(int, line.split())
    if (child := os.fork()) == 0:  # a heap of its own
        torch.set_num_threads(threads)
        search(*sizes)
        os._exit(0)
    os.waitpid(child, 0)
"""
SHAPES = [(1000, 100_000, 16, 10), (64, 200_000, 16, 300), (3, 200_000, 16, 10)]


def test_extra_memory_stays_below_the_bound() -> None:
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    cases = [(threads, *shape) for threads in (1, 2) for shape in SHAPES]
    command = [sys.executable, "-c", PROGRAM, *(" ".join(map(str, case)) for case in cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # no thread before the forks
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not let a process reset its peak")
    found = [int(line) for line in done.stdout.split()]
    assert len(found) == len(cases), done.stderr
    for (_, count, rows, _, k), extra in zip(cases, found, strict=True):
        bound = 8 * count * max(64 * k, 1024) + 4 * rows
        # A megabyte for packed queries, a tile of rows, and what an allocator rounds up.
        assert extra <= bound + (1 << 20), f"{extra:,} bytes, bound {bound:,}"
        assert bound < count * rows * 4 or count < 64
