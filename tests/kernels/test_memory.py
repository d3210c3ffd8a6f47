"""The memory kernels without a GPU: machine code for three architectures, bytes moved, launches."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from memkern.testing import aot
from memkern.testing.aot import meta
from memkern.testing.traffic import count_traffic

pytest.importorskip("triton")
from memkern.triton_kernels import memory

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the Triton interpreter (TRITON_INTERPRET=1)"
)


def fields(make: Any, B: int, N: int, W: int, R: int, H: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    state = [make(B, N, W), make(B, N), make(B, H, N, N), make(B, H, N), make(B, R, N), make(B, H, N)]
    said = [
        *(make(B, R, W), make(B, R), make(B, R, 1 + 2 * H)),
        *(make(B, H, W), make(B, H), make(B, H, W), make(B, H, W), make(B, R), make(B, H), make(B, H)),
    ]
    return state, said


def step(
    B: int, N: int, W: int, R: int, H: int, *, make: Any = meta, sharpen: bool = False, deallocate: bool = False,
    mask: torch.Tensor | None = None,
) -> None:  # fmt: skip
    state, said = fields(make, B, N, W, R, H)
    gamma = make(B, R) if sharpen else None
    out = memory.memory_step_fwd(state, said, gamma, mask, True, True, deallocate, True)
    saved = [out[i] for i in (1, 2, 5, 6, 7, 8, 9, 10)]
    memory.memory_step_bwd(*out[:7], state, said, gamma, mask, saved, True, True, deallocate, False)


def segment(B: int, N: int, W: int, R: int, H: int) -> None:
    """What only the scan starts: the write alone, and the links without reads."""
    from memkern.triton_kernels.memory import _launch, forward

    state, said = fields(meta, B, N, W, R, H)
    named = dict(zip(_launch.INTERFACE, said, strict=True))
    forward.write_memory(state[0], state[5], state[4], named, None, True, meta(B, N, W))
    forward.update_links(state[2], state[3], state[5], None, None, meta(B, H, N, N), meta(B, H, N))


def scan(
    B: int, N: int, W: int, R: int, H: int, T: int, *, make: Any = meta, sharpen: bool = False, mask: bool = False,
    deallocate: bool = False, every: int = 8, save: bool = True,
) -> list[torch.Tensor]:  # fmt: skip
    state, said = fields(make, B, N, W, R, H)
    said = [make(B, T, *field.shape[1:]) for field in said]
    gamma = make(B, T, R) if sharpen else None
    live = make(B, T) > 0.4 if mask else None
    return memory.memory_scan_fwd(state, said, gamma, live, True, True, deallocate, every, save)


def parts(B: int, N: int, W: int, R: int, H: int) -> None:
    (m, usage, links, before, reading, writing), said = fields(meta, B, N, W, R, H)
    keys, strengths, erase, add, free = said[3], said[4], said[6], said[5], said[7]
    slots = meta(B, N, dtype=torch.bool)
    weights = memory.content_weights_fwd(m, keys, strengths, slots)
    memory.content_weights_bwd(weights, m, keys, strengths, slots, weights)
    rows, gamma = meta(B * H, N), meta(B * H)
    memory.sharpen_bwd(rows, rows, gamma, memory.sharpen_fwd(rows, gamma))
    memory.allocation_weights_bwd(memory.allocation_weights_fwd(usage), usage)
    memory.update_usage_bwd(
        memory.update_usage_fwd(usage, writing, reading, free), usage, writing, reading, free, False
    )
    new, after = memory.update_links_fwd(links, before, writing)
    memory.update_links_bwd(new, after, links, before, writing)
    ahead, back = memory.directional_weights_fwd(links, reading)
    memory.directional_weights_bwd(ahead, back, links, reading)
    memory.read_memory_bwd(memory.read_memory_fwd(m, reading), m, reading)
    memory.write_memory_bwd(memory.write_memory_fwd(m, writing, erase, add), m, writing, erase, add)


CASES = [
    aot.Case("large", lambda: step(64, 1024, 64, 4, 1), second=(80,)),
    aot.Case("medium", lambda: step(32, 256, 64, 4, 1, sharpen=True, mask=meta(32, dtype=torch.bool)), archs=(90,)),
    aot.Case("wide", lambda: step(8, 64, 768, 4, 4, deallocate=True), archs=(90,)),
    aot.Case("odd", lambda: step(2, 37, 7, 3, 2), archs=(80,)),
    aot.Case("one of each", lambda: step(1, 1, 1, 1, 1, sharpen=True), archs=(90,), second=()),
    aot.Case("scan", lambda: scan(64, 64, 64, 4, 1, 32), archs=(80,)),
    aot.Case("scan odd", lambda: scan(2, 37, 50, 3, 1, 5, sharpen=True, mask=True, deallocate=True), archs=(90,)),
    aot.Case("scan heads", lambda: scan(8, 29, 50, 5, 2, 6, sharpen=True, mask=True, deallocate=True), archs=(80,)),
    aot.Case("parts", lambda: parts(32, 256, 64, 4, 2), archs=(90,)),
    aot.Case("segment", lambda: segment(32, 256, 64, 4, 1), archs=(90,), second=()),
]


def test_no_kernel_spills(toolchain: aot.Toolchain) -> None:
    aot.assert_clean(aot.reports(__file__, toolchain))


def test_links_are_moved_16_bytes_at_a_time(toolchain: aot.Toolchain) -> None:
    for kernel in ("_links", "_links_bwd"):
        found = [r for r in aot.reports(__file__, toolchain) if (r.case, r.kernel) == ("large", kernel)]
        assert {r.arch for r in found} >= {80}
        assert all(r.count("LDG.E.128") > 0 and r.count("STG.E.128") > 0 for r in found)


@interpreted
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(("sharpen", "mask"), [(False, False), (True, True)])
def test_a_scan_on_the_chip_is_one_launch_and_the_host_loop_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, save: bool, sharpen: bool, mask: bool
) -> None:
    """Every output, history and snapshot, from one launch as from three a step."""
    sizes = (2, 5, 4, 3, 2, 4)
    options: dict[str, Any] = {"make": torch.rand, "sharpen": sharpen, "mask": mask, "every": 2, "save": save}
    torch.manual_seed(1)
    with count_traffic() as traffic:
        once = scan(*sizes, **options)
    assert len(traffic.launches) == 1
    assert traffic.total.atomics == 0
    monkeypatch.setattr(memory.on_chip, "LIMIT", 0)
    torch.manual_seed(1)
    loop = scan(*sizes, **options)
    # What a masked step saves of its lookup is not read.
    compared = [pair for i, pair in enumerate(zip(once, loop, strict=True)) if not mask or i not in range(7, 11)]
    assert all(torch.equal(a, b) for a, b in compared)


@interpreted
def test_a_step_passes_twice_over_the_links_and_its_backward_three_times() -> None:
    sizes = (2, 32, 16, 2, 1)
    state, said = fields(torch.rand, *sizes)
    links = state[2].nbytes
    with count_traffic() as forward:
        out = memory.memory_step_fwd(state, said, None, None, True, True, False, True)
    assert len(forward.launches) == 3
    assert forward.of(state[2]).loaded == forward.of(out[3]).stored == links
    assert forward.total.atomics == 0
    saved = [out[i] for i in (1, 2, 5, 6, 7, 8, 9, 10)]
    grads = [torch.rand_like(x) for x in out[:7]]
    with count_traffic() as backward:
        made = memory.memory_step_bwd(*grads, state, said, None, None, saved, True, True, False, False)
    assert len(backward.launches) <= 4
    assert backward.of(state[2]).loaded == backward.of(grads[3]).loaded == backward.of(made[2]).stored == links
    assert backward.total.atomics == 0
