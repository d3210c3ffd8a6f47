"""The memory's scan by clusters of several blocks, on a GPU that has them: the gradients, and the same bits every time.

The emulator (tests/kernels/test_memory_cuda.py) finds wrong values and indices; what only hardware has, blocks that run
at the same time, shows here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memkern import backends, ops
from memkern.benchmarks.ops.memory import make_interface, make_state
from memkern.reference import memory as reference
from memkern.testing.compare import assert_matches, flatten

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with clusters"
)

# B, N, W, R, H, T: two, four and eight blocks; the gradients of two heads' links at 512 slots do not fit their memory.
SHAPES = {
    "two blocks": (40, 128, 32, 2, 1, 7),
    "four blocks": (40, 256, 64, 4, 1, 7),
    "eight blocks": (20, 512, 64, 4, 1, 5),
    "two write heads": (20, 512, 32, 5, 2, 5),
}


def arguments(shape: tuple[int, ...], batch: int | None = None) -> dict[str, Any]:
    sizes = dict(zip("BNWRHT", shape, strict=True))
    sizes["B"] = batch or sizes["B"]
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    made = make_state(sizes, torch.float32, generator), make_interface(sizes, torch.float32, generator)
    state, said = (type(fields)(*(field.requires_grad_() for field in fields)) for fields in made)
    mask = torch.rand(sizes["B"], sizes["T"], generator=generator, device=DEVICE) > 0.2
    return {"state": state, "interface": said, "step_mask": mask, "checkpoint_every": 3, "deallocate": True}


def scan(**given: Any) -> Any:
    return ops.memory_scan(**given, backend="cuda")


@pytest.fixture(autouse=True)
def available() -> None:
    reason = backends.explain("memory_scan")["cuda"]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    assert_matches(scan, reference.memory_scan, arguments(shape, batch=2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_same_bits_every_time(shape: tuple[int, ...]) -> None:
    made = arguments(shape)
    leaves = [leaf for leaf in flatten(made).values() if leaf.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        outputs = [out for out in flatten(scan(**made)).values() if out.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])

    first = gradients()
    for _ in range(20):
        assert all(torch.equal(got, want) for got, want in zip(gradients(), first, strict=True))
