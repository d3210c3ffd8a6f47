"""The search never holds Q x N: resident memory of a process before and after, against the stated bound."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import memkern

PROGRAM = """
import sys, torch
from pathlib import Path
from memkern.ops import cosine_topk

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

torch.set_num_threads(int(sys.argv[1]))
count, rows, width, k = map(int, sys.argv[2:6])
queries, database = torch.randn(count, width), torch.randn(rows, width)
cosine_topk(queries[:3], database[:100], k, backend="cpp")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
found = cosine_topk(queries, database, k, backend="cpp")
print(peak() - before - found.scores.nbytes - found.indices.nbytes)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1000, 100_000, 16, 10), (64, 200_000, 16, 300), (3, 200_000, 16, 10)], ids=str)
def test_extra_memory_stays_below_the_bound(shape: tuple[int, int, int, int], threads: int) -> None:
    if memkern.backends._declines("cosine_topk", "cpp", (torch.empty(1, 1),)):
        pytest.skip("backend cpp is not here")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", PROGRAM, str(threads), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    count, rows, _, k = shape
    bound = 8 * count * max(64 * k, 1024) + 4 * rows
    # A megabyte for packed queries, a tile of rows, and what an allocator rounds up.
    assert int(done.stdout) <= bound + (1 << 20), f"{int(done.stdout):,} bytes, bound {bound:,}"
    assert bound < count * rows * 4 or count < 64
