"""What memkern costs beside its kernels: the import, and a public function around its raw operator."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from . import timing

# Processor seconds of `import memkern` in a process that has torch already.
_IMPORT = """
import time, torch
start = time.process_time()
import memkern
print(time.process_time() - start, *(name in __import__("sys").modules for name in ("triton", "transformers")))
"""


def import_seconds(tries: int = 5) -> float:
    """The least processor time that ``import memkern`` took above ``import torch``, each try in a fresh process.

    From compiled bytecode, as an installed package has it, whatever ``PYTHONDONTWRITEBYTECODE`` says: the first try
    writes it.

    Raises:
        RuntimeError: it imported triton or transformers too.
    """
    found = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(tries):
        command = [sys.executable, "-c", _IMPORT]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds, *heavy = run.stdout.split()
        if "True" in heavy:
            raise RuntimeError("import memkern: imports triton or transformers")
        found.append(float(seconds))
    return min(found)


def call_seconds() -> float | None:
    """What ``route_experts`` without gradients adds to its raw C++ operator on one row of one slot.

    Returns:
        None where there is no compiled library.
    """
    from memkern import backends
    from memkern.ops.routing import route_experts
    from memkern.ops.routing._schemas import ROUTE_FWD

    hiddens, weight = torch.randn(1, 1, 8), torch.randn(2, 8)
    if backends.explain("route_experts", hiddens, weight)["cpp"] is not None:
        return None
    raw = ROUTE_FWD["cpp"]
    with torch.no_grad():
        times = timing.cpu_times(
            {
                "raw": lambda: raw(hiddens, weight, None, None, 1.0, 0, None, None, None, 10.0, False),
                "public": lambda: route_experts(hiddens, weight),
            }
        )
    return times["public"].least - times["raw"].least


def measure() -> dict[str, float]:
    """Seconds of both, by what costs them."""
    call = call_seconds()
    return {"import memkern above torch": import_seconds()} | (
        {} if call is None else {"route_experts above its operator": call}
    )
