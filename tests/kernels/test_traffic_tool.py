"""The counting itself: exact bytes, masks, re-reads, atomics, descriptors, and accesses outside of a tensor."""

from __future__ import annotations

import os

import pytest
import torch

from memkern.testing.traffic import OutOfBounds, Traffic, count_traffic

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the Triton interpreter (TRITON_INTERPRET=1)"
)


@triton.jit
def _scale(x, y, size, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PASSES):
        total += tl.load(x + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(y + offsets, total, mask=offsets < size)


@triton.jit
def _rows(x, weight, y, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    row = tl.program_id(0) * WIDTH
    tl.store(y + row + columns, tl.load(x + row + columns) * tl.load(weight + columns))


@triton.jit
def _count(counter, x):
    tl.atomic_add(counter + tl.arange(0, 4), 1, mask=tl.arange(0, 4) < 3)
    tl.atomic_cas(counter, 5, 6)
    tl.store(x, tl.load(x) + 1)


@triton.jit
def _through_descriptor(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [ROWS, COLUMNS], [COLUMNS, 1], [4, 8])
    target = tl.make_tensor_descriptor(y, [ROWS, COLUMNS], [COLUMNS, 1], [4, 8])
    target.store([0, 8], source.load([0, 8]))


def scale(x: torch.Tensor, y: torch.Tensor, passes: int = 1, extra: int = 0) -> None:
    _scale[(2,)](x, y, x.numel() + extra, BLOCK=64, PASSES=passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bytes_that_the_mask_lets_through(dtype: torch.dtype) -> None:
    x, y = torch.ones(100, dtype=dtype), torch.empty(100)
    with count_traffic() as traffic:
        scale(x, y)
    assert traffic.of(x) == Traffic(loaded=x.nbytes, unique_loaded=x.nbytes)
    assert traffic.of(y) == Traffic(stored=y.nbytes, unique_stored=y.nbytes)
    assert traffic.by_tensor == {"x": traffic.of(x), "y": traffic.of(y)}
    assert (traffic.bytes_loaded, traffic.bytes_stored) == (x.nbytes, y.nbytes)
    assert traffic.moved() == x.nbytes + y.nbytes
    assert traffic.launches == [("_scale", (2,))]
    assert traffic.programs == 2
    assert torch.equal(y, torch.ones(100))


def test_a_kernel_that_reads_twice_is_caught() -> None:
    x, y = torch.ones(100), torch.empty(100)
    with count_traffic() as traffic:
        scale(x, y, passes=2)
    assert traffic.of(x) == Traffic(loaded=2 * x.nbytes, unique_loaded=x.nbytes)
    assert traffic.moved() > 1.1 * (x.nbytes + y.nbytes)


def test_what_stays_in_cache_counts_once() -> None:
    x, weight, y = torch.ones(5, 16), torch.ones(16), torch.empty(5, 16)
    with count_traffic() as traffic:
        _rows[(5,)](x, weight, y, WIDTH=16)
    assert traffic.of(weight).loaded == 5 * weight.nbytes
    assert traffic.moved(resident=("weight",)) == x.nbytes + y.nbytes + weight.nbytes
    with pytest.raises(ValueError, match="weights"):
        traffic.moved(resident=("weights",))


def test_views_share_their_memory_and_launches_add_up() -> None:
    memory = torch.zeros(300)
    with count_traffic() as traffic:
        scale(memory[:100], memory[200:])
        scale(memory[100:200], memory[200:])
    assert traffic.of(memory) == Traffic(800, 800, 800, 400)
    assert traffic.by_tensor.keys() == {"x"}
    assert len(traffic.launches) == 2


def test_freed_scratch_memory_is_not_taken_for_another_tensor() -> None:
    x = torch.ones(100)
    with count_traffic() as traffic:
        for _ in range(3):
            scale(x, torch.empty(100))
    assert traffic.by_tensor["y"] == Traffic(stored=1200, unique_stored=1200)


def test_atomics_are_counted_apart() -> None:
    counter, x = torch.zeros(4, dtype=torch.int32), torch.zeros(1)
    with count_traffic() as traffic:
        _count[(2,)](counter, x)
    assert traffic.of(counter) == Traffic(atomics=8)
    assert traffic.of(x) == Traffic(8, 8, 4, 4)
    assert counter.tolist() == [2, 2, 2, 0]


def test_descriptors() -> None:
    x, y = torch.rand(4, 16), torch.zeros(4, 16)
    with count_traffic() as traffic:
        _through_descriptor[(1,)](x, y, ROWS=4, COLUMNS=16)
    assert traffic.of(x) == Traffic(loaded=128, unique_loaded=128)
    assert traffic.of(y) == Traffic(stored=128, unique_stored=128)
    assert torch.equal(y[:, 8:], x[:, 8:])


@pytest.mark.parametrize("extra", [1, 28])
def test_an_access_outside_of_the_tensors_is_an_error_before_it_happens(extra: int) -> None:
    x, y = torch.ones(100), torch.empty(100)
    with count_traffic(), pytest.raises(OutOfBounds, match=rf"_scale: load of {extra} lanes outside of \['x', 'y'\]"):
        scale(x, y, extra=extra)


def test_nothing_is_left_behind() -> None:
    x, y = torch.ones(100), torch.empty(100)
    with count_traffic() as traffic:
        pass
    scale(x, y)
    assert traffic.total == Traffic()
    assert traffic.launches == []
    from triton.runtime.interpreter import interpreter_builder

    assert not any(name.startswith("create_masked") for name in vars(interpreter_builder))


def test_the_table() -> None:
    x, y = torch.ones(100), torch.empty(100)
    with count_traffic() as traffic:
        scale(x, y, passes=3)
    lines = [line.split() for line in str(traffic).splitlines()]
    assert lines[1] == ["x", "1200", "400", "0", "0", "0"]
    assert lines[2] == ["y", "0", "0", "400", "400", "0"]
