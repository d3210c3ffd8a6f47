"""What the kernels and launchers of every column share.

A kernel here runs in three worlds: compiled on a GPU, compiled ahead of time without one (its tensors are then on the
``meta`` device), and interpreted on the CPU (``TRITON_INTERPRET=1``). The functions below hide the difference:

- in kernels :func:`mdot`, :func:`cast`, :func:`tanh`, :func:`is_nan` and :func:`arrive_last`;
- in launchers :func:`on_device`, :func:`adjacent`, :func:`sm_count`, :func:`capability`, :func:`tickets`,
  :data:`LAUNCH` and :data:`ALL_REGISTERS`.

The interpreter keeps bfloat16 as raw 16-bit integers, so arithmetic on it is silently wrong there: convert to float32
right after a load, and back by :func:`cast` right before a store.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(INTERPRETING)

LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch: Triton's default for fused multiply-add changes between versions, ours does not."""

ALL_REGISTERS: dict[str, Any] = {**LAUNCH, "maxnreg": 255}
"""Options of kernels of at most eight warps that may take every register a thread can have: left alone, the assembler
may spill a few of them to make room for one block more."""


@triton.jit
def mdot(a, b, acc, IP: tl.constexpr):
    """acc + a @ b with input precision ``IP`` ("ieee", "tf32", "tf32x3"); bfloat16 and float16 run natively."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=IP)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 -> ``dtype``, rounded to nearest even everywhere; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh of float32 without the device library, which the interpreter does not have."""
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def arrive_last(ticket, arrivals):
    """True in exactly one of ``arrivals`` programs, the last to come; it sees what the others stored before.

    The barrier puts every thread's stores before the arrival, which alone is atomic. The last program leaves the
    counter at zero for the next launch. What it then reads it has to add in an order that no race decides.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(ticket, 0)
    return last


_NO_GUARD = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Region in which a launch goes to the device of ``tensor``; free of cost when that is the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)


def adjacent(x: Tensor) -> Tensor:
    """``x`` with its last axis in consecutive elements; every other stride as it comes."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors to fill: the device's own, an H200's ahead of time, a handful under the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if INTERPRETING else 132


def capability(device: torch.device) -> int:
    """Compute capability as 80, 90, 100; ahead of time that of the target, 90 under the interpreter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return 90 if INTERPRETING else int(triton.runtime.driver.active.get_current_target().arch)


class _TicketOffice:
    """Hands out zeroed int32 counters of one device; see :func:`tickets`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.by_stream: dict[int, Tensor] = {}
        self.for_captures: Tensor | None = None
        self.captured = 0
        self.outgrown: list[Tensor] = []

    def _zeros(self, count: int) -> Tensor:
        """Zeroed counters that live as long as the process.

        Allocated by a thread of their own: the warm-up of a CUDA graph tree diverts this thread's allocations to a
        pool in which nothing may outlive the step. The only synchronisation, once per stream.
        """
        made: list[Tensor] = []

        def allocate() -> None:
            made.append(torch.zeros(count, dtype=torch.int32, device=self.device))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()

        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        return made[0]

    def of_stream(self, stream: int, count: int) -> Tensor:
        found = self.by_stream.get(stream)
        if found is None or found.numel() < count:
            with self.lock:
                if found is not None:
                    self.outgrown.append(found)  # a launch in flight may still count on it
                found = self.by_stream[stream] = self._zeros(max(1024, triton.next_power_of_2(count)))
                if self.for_captures is None:
                    self.for_captures = self._zeros(1 << 16)
        return found

    def of_capture(self, count: int) -> Tensor:
        with self.lock:
            first, last = self.captured, self.captured + count
            if self.for_captures is None or last > self.for_captures.numel():
                return torch.zeros(count, dtype=torch.int32, device=self.device)
            self.captured = last
            return self.for_captures[first:last]


@functools.cache
def _office(device: torch.device) -> _TicketOffice:
    return _TicketOffice(device)


def tickets(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters that are zero before the launch that takes them, and that it leaves at zero.

    No launch clears them. Two launches must not count on the same ones at the same time:

    - launches on one stream run one after the other, so that a stream has one set for all of them;
    - a captured launch may be replayed beside anything, so that it gets counters which are never handed out again,
      from 65536 that the device's first eager launch puts aside; past those, or in a capture without any eager launch
      before it, the graph gets a fill of its own.
    """
    if device.type == "cuda":
        office = _office(device)
        if torch.cuda.is_current_stream_capturing():
            return office.of_capture(count)
        return office.of_stream(torch.cuda.current_stream(device).cuda_stream, count)
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    return _office(device).of_stream(0, count)
