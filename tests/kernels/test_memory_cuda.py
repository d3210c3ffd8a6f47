"""The CUDA memory kernels and their bindings on the processor (``csrc/emulator``): every value and every gradient.

The whole column runs there on request: ``pytest tests/ops --backend cuda_emulated``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from memkern import ops
from memkern.benchmarks import registry
from memkern.benchmarks.ops.memory import make_interface, make_state
from memkern.reference import memory as reference
from memkern.testing import emulate
from memkern.testing.compare import assert_matches


@pytest.fixture(autouse=True)
def emulated(poison: object) -> Iterator[None]:
    reason = emulate.absent()
    if reason is not None:
        pytest.skip(reason)
    with emulate.emulated():
        yield


def inputs(sizes: dict[str, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(sizes.values()))
    made = make_state(sizes, torch.float32, generator), make_interface(sizes, torch.float32, generator)
    state, said = (type(fields)(*(field.requires_grad_() for field in fields)) for fields in made)
    return {"state": state, "interface": said}


def on_cuda(function: Any) -> Any:
    return lambda **arguments: function(**arguments, backend="cuda")


# Rows in several blocks and parts, packs of four and single elements, more heads than one pass takes.
STEPS = {
    "packs": ((1, 132, 40, 4, 1), {}),
    "single elements": ((1, 70, 33, 1, 2), {"deallocate": True}),
    "many heads": ((2, 6, 70, 5, 2), {"step_mask": torch.tensor([True, False])}),
    "no links": ((2, 9, 5, 2, 1), {"track_links": False, "sharpness": 1.5}),
    "no usage": ((1, 1, 3, 2, 3), {"track_usage": False, "detach_usage": True}),
}


@pytest.mark.parametrize(("shape", "options"), STEPS.values(), ids=STEPS.keys())
def test_step(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    made = inputs(dict(zip("BNWRH", shape, strict=True)))
    assert_matches(on_cuda(ops.memory_step), reference.memory_step, made | options)


@pytest.mark.parametrize("every", [2, 9])
def test_scan(every: int) -> None:
    made = inputs({"B": 2, "N": 11, "W": 6, "R": 3, "H": 2, "T": 4})
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    options = {"step_mask": mask, "sharpness": 2.0, "deallocate": True, "checkpoint_every": every}
    assert_matches(on_cuda(ops.memory_scan), reference.memory_scan, made | options)


# Segments of one step, that do not divide the steps, and longer than all. The last two for backward alone, in blocks
# with so few KiB of shared memory that the gradients of the links lie elsewhere, or that some blocks have no rows.
RESIDENT = {
    "one block": ((2, 12, 6, 3, 2), 227, {"sharpness": 2.0, "deallocate": True, "checkpoint_every": 3}),
    "two blocks": ((1, 72, 9, 5, 1), 227, {"checkpoint_every": 2}),
    "four blocks": ((1, 132, 7, 1, 1), 227, {"track_usage": False, "checkpoint_every": 9}),
    "no links": ((1, 68, 5, 2, 1), 227, {"track_links": False, "detach_usage": True, "checkpoint_every": 1}),
    "links that do not fit": ((1, 36, 4, 1, 2), 35, {"checkpoint_every": 2}),
    "blocks without rows": ((1, 12, 600, 1, 1), 48, {"checkpoint_every": 3}),
}


@pytest.mark.parametrize(("shape", "kib", "options"), RESIDENT.values(), ids=RESIDENT.keys())
def test_scan_in_one_launch(
    shape: tuple[int, ...], kib: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, what backward reads, and every gradient of the scan that is one launch of clusters each way."""
    made = inputs(dict(zip("BNWRHT", (*shape, 4), strict=True)))
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])[: shape[0]]
    options = options | {"step_mask": mask}
    monkeypatch.setenv("MEMKERN_EMULATED_CLUSTERS", str(kib))
    assert_matches(on_cuda(ops.memory_scan), reference.memory_scan, made | options)
    before = emulate.launches()
    reads, state = ops.memory_scan(**made, **options, backend="cuda")
    between = emulate.launches()
    # Of two results alone: there are no gradients of the others.
    torch.autograd.backward([reads.sum(), state.memory.sum()])
    assert emulate.launches() - between == 1
    assert between - before == 1 or kib < 227


@pytest.mark.parametrize(
    "name",
    [
        "content_weights", "sharpen", "allocation_weights", "update_usage", "update_links", "directional_weights",
        "read_memory", "write_memory",
    ],
)  # fmt: skip
def test_parts(name: str) -> None:
    spec = registry.spec(name)
    for size in ("odd", "empty"):
        assert_matches(on_cuda(spec.public), spec.reference, spec.case(size).arguments())


@pytest.mark.parametrize("slots", [40, 1100])
def test_allocation_with_ties(slots: int) -> None:
    """Counted, and past 1024 slots sorted."""
    usage = 0.99 + 0.01 * torch.rand(1, slots)
    usage[:, ::3] = 0.995
    made = {"usage": usage.requires_grad_()}
    assert_matches(on_cuda(ops.allocation_weights), reference.allocation_weights, made)
