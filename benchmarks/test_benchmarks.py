"""``pytest benchmarks --benchmark-only``: the registry's small cases through pytest-benchmark.

With ``--benchmark-disable`` each runs once, as a test that the benchmark itself works.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from memkern.backends import BackendUnavailable
from memkern.benchmarks import machine, registry
from memkern.benchmarks.providers import Judge, default_names, make_call, provider
from memkern.benchmarks.registry import Case, Unsuitable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [spec.case("small", device=DEVICE) for spec in registry.specs().values() if "small" in spec.shapes]


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in default_names(case) if name != "compile"],
    ids=lambda value: value.spec.name if isinstance(value, Case) else str(value),
)
def test_small(benchmark: Any, case: Case, name: str, mode: str) -> None:
    candidate = provider(name)
    try:
        passed, words = Judge(case).verdict(candidate, [mode])
        call = make_call(case, candidate.function(case), mode)
    except (Unsuitable, BackendUnavailable) as error:
        pytest.skip(str(error))
    assert passed, words
    benchmark.group = f"{case.label} {mode}"
    cost = case.work.of(mode)
    benchmark.extra_info.update(
        {"bytes": cost.bytes, "flops": cost.flops, "threads": torch.get_num_threads(), "kernels": machine.kernel_hash()}
    )
    if DEVICE == "cuda":

        def finished() -> None:
            call()
            torch.cuda.synchronize()

        benchmark(finished)
    else:
        benchmark._timer = time.process_time
        benchmark(call)
