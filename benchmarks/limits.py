"""What this machine can do at best, measured in the same run as the operators: the denominators of every share.

``read``, ``write`` and ``copy`` are bandwidths in bytes/s (a copy counts what it reads and what it writes), ``peak`` is
the rate of fused multiply-adds in FLOP/s, and :func:`gemm_seconds` the fastest library's time for given products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memkern import native

from .registry import DTYPES, Gemm
from .timing import Call, Times, cpu_times, cuda_times, one_thread

_CPU_BYTES = 128 << 20
_GPU_BYTES = 2 << 30
_FMA_ROUNDS = 1 << 20


def measure(device: str) -> dict[str, float]:
    """The bandwidths (bytes/s) and rates (FLOP/s) of the device; on the CPU those of one thread."""
    return _cuda() if device == "cuda" else _cpu()


def _cpu() -> dict[str, float]:
    source = torch.rand(_CPU_BYTES // 4)
    times = cpu_times(_cpu_calls(("read", "write", "copy", "peak"), [source]), seconds=1.0, rounds=9)
    return _cpu_rates(times, source.nbytes)


def _cpu_calls(names: Collection[str], sources: Sequence[Tensor]) -> dict[str, Call]:
    """What shows the limits ``names`` on memory like ``sources``; two loops read, and the faster one counts."""
    calls: dict[str, Call] = {}
    if {"write", "copy"} & set(names):
        targets = [torch.empty_like(source) for source in sources]
        calls["write"] = lambda: [target.fill_(1.0) for target in targets]
        calls["copy"] = lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)]
    if "read" in names:
        calls["sum"] = lambda: [source.sum() for source in sources]
    if native.LIBRARIES["cpu"].loaded:
        if "read" in names:
            calls["read"] = lambda: [torch.ops.memkern.cpu_read(source) for source in sources]
        if "peak" in names:
            calls["peak"] = lambda: torch.ops.memkern.cpu_fma(_FMA_ROUNDS)
    return calls


def _cpu_rates(times: Mapping[str, Times], size: int) -> dict[str, float]:
    found: dict[str, float] = {}
    reads = [times[name].least for name in ("sum", "read") if name in times]
    if reads:
        found["read"] = size / min(reads)
    if "write" in times:
        found["write"] = size / times["write"].least
    if "copy" in times:
        found["copy"] = 2 * size / times["copy"].least
    if "peak" in times:
        found["peak"] = torch.ops.memkern.cpu_fma(_FMA_ROUNDS) / times["peak"].least
    return found


class Beside:
    """Limits of one CPU thread that take turns with the operator whose share of them is wanted.

    The bandwidth of a shared machine moves by a third from minute to minute, and by a tenth with the pages that an
    allocation gets. So both see the same minutes, and both read the operator's own inputs where those are so large that
    no cache holds a good part of them.

    Args:
        names: of ``read``, ``write``, ``copy`` and ``peak``.
        inputs: the operator's tensors.
        gemms: matrix products for the limit ``gemm``.
        dtype: theirs, a name of :data:`~memkern.benchmarks.registry.DTYPES`.
    """

    _PREFIX = "limit "

    def __init__(
        self, names: Collection[str], inputs: Sequence[Tensor], gemms: Sequence[Gemm] = (), dtype: str = "float32"
    ) -> None:
        large = [tensor.detach() for tensor in inputs if tensor.nbytes >= 1 << 20 and tensor.is_contiguous()]
        if names and sum(tensor.nbytes for tensor in large) < _CPU_BYTES // 2:
            large = [torch.rand(_CPU_BYTES // 4)]
        self._size = sum(tensor.nbytes for tensor in large)
        self._gemms = len(gemms)
        self.calls: dict[str, Call] = {self._PREFIX + name: call for name, call in _cpu_calls(names, large).items()}
        for number, gemm in enumerate(gemms):
            for library, make in _libraries(gemm, dtype, "cpu").items():
                self.calls[f"{self._PREFIX}gemm {number} {library}"] = make(gemm, DTYPES[dtype], "cpu")

    def take(self, times: dict[str, Times]) -> tuple[dict[str, float], float | None]:
        """Removes this object's calls from ``times``: the limits they show, and the seconds of the products if any."""
        own = {name.removeprefix(self._PREFIX): times.pop(name) for name in self.calls}
        seconds = None
        if self._gemms:
            seconds = sum(
                min(t.least for name, t in own.items() if name.startswith(f"gemm {number} "))
                for number in range(self._gemms)
            )
        return _cpu_rates(own, self._size), seconds


def _cuda() -> dict[str, float]:
    source = torch.empty(_GPU_BYTES // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    calls: dict[str, Sequence[Call]] = {
        "read": [lambda: source.view(-1, 1 << 16).sum(1)],
        "write": [lambda: target.fill_(1.0)],
        "copy": [lambda: target.copy_(source)],
    }
    flops = {}
    for dtype, size in (("bfloat16", 8192), ("float32", 4096)):
        a, b = (torch.randn(size, size, device="cuda").to(DTYPES[dtype]) for _ in range(2))
        calls[f"gemm-{dtype}"] = [functools.partial(torch.mm, a, b)]
        flops[f"gemm-{dtype}"] = 2.0 * size**3
    times = {name: t.p50 for name, t in cuda_times(calls, seconds=0.2).items()}
    limits = {
        "read": _GPU_BYTES / times["read"],
        "write": _GPU_BYTES / times["write"],
        "copy": 2 * _GPU_BYTES / times["copy"],
    }
    return limits | {name: count / times[name] for name, count in flops.items()}


def gemm_seconds(gemms: Sequence[Gemm], dtype: str, device: str) -> float:
    """Time of the products one after another, each by the fastest library that is here."""
    total = 0.0
    for gemm in gemms:
        made = {name: make(gemm, DTYPES[dtype], device) for name, make in _libraries(gemm, dtype, device).items()}
        if device == "cuda":
            times = cuda_times({name: [call] for name, call in made.items()}, seconds=0.1)
            total += min(t.p50 for t in times.values())
        else:
            times = cpu_times(made, seconds=0.4, rounds=7)
            total += min(t.least for t in times.values())
    return total


Maker = Callable[[Gemm, torch.dtype, str], Call]


def _libraries(gemm: Gemm, dtype: str, device: str) -> dict[str, Maker]:
    found: dict[str, Maker] = {"blas": _blas}
    if device == "cpu" and torch.backends.mkldnn.is_available() and dtype in ("float32", "bfloat16", "float16"):
        found["onednn"] = _onednn
    return found


def _operands(gemm: Gemm, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    a = torch.randn(gemm.batch, gemm.m, gemm.k, device=device).to(dtype)
    b = torch.randn(gemm.batch, gemm.n, gemm.k, device=device).to(dtype)
    return a, b


def _blas(gemm: Gemm, dtype: torch.dtype, device: str) -> Call:
    a, b = _operands(gemm, dtype, device)
    out = torch.empty(gemm.batch, gemm.m, gemm.n, dtype=dtype, device=device)
    if gemm.batch == 1:
        return lambda: torch.mm(a[0], b[0].t(), out=out[0])
    return lambda: torch.bmm(a, b.transpose(1, 2), out=out)


def _onednn(gemm: Gemm, dtype: torch.dtype, device: str) -> Call:
    a, b = _operands(gemm, dtype, device)
    pairs = list(zip(a.unbind(), b.unbind(), strict=True))
    linear: Any = torch.ops.mkldnn._linear_pointwise.default

    def run() -> None:
        for left, right in pairs:
            linear(left, right, None, "none", [], "")

    return run


class GemmTimes:
    """:func:`gemm_seconds`, each once in a run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._known: dict[tuple[tuple[Gemm, ...], str], float] = {}

    def seconds(self, gemms: Sequence[Gemm], dtype: str) -> float:
        key = (tuple(gemms), dtype)
        if key not in self._known:
            with one_thread():
                self._known[key] = gemm_seconds(gemms, dtype, self.device)
        return self._known[key]
