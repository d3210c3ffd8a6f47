"""The products of the CPU operators, and the memory that their large gradients come from."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import memkern.ops  # noqa: F401 - loads the library
from memkern import native

pytestmark = pytest.mark.skipif(not native.LIBRARIES["cpu"].loaded, reason="the cpu library was not built")


def factor(rows: int, columns: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if layout == "rows":
        return torch.randn(rows, columns).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, 3, columns, 2).to(dtype)[:, 1, :, 1]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (13, 100, 300), (130, 193, 513), (8, 48, 16), (9, 49, 257)])
def test_products_of_any_strides(sizes: tuple[int, int, int]) -> None:
    rows, columns, depth = sizes
    for left, right in itertools.product(("rows", "columns", "strided"), repeat=2):
        a, b = factor(rows, depth, left), factor(depth, columns, right)
        exact = a.double() @ b.double()
        bound = 1e-6 * depth**0.5 * (a.double().abs() @ b.double().abs())
        wide = torch.full((rows + 1, columns + 5), 7.0)
        out = wide[:rows, 2 : columns + 2]
        torch.ops.memkern.matmul_rows(out, a, b)
        assert ((out - exact).abs() <= bound).all()
        torch.ops.memkern.matmul_rows(out, a, b, True)
        assert ((out - 2 * exact).abs() <= 3 * bound).all()
        wide[:rows, 2 : columns + 2] = 7.0
        assert (wide == 7.0).all()  # nothing beside the output was written


@pytest.mark.skipif(
    native.LIBRARIES["cpu"].loaded and not torch.ops.memkern.matmul_takes_bf16(), reason="no pairs of bfloat16 here"
)
class TestPairsOfBfloat16:
    @pytest.mark.parametrize(
        "sizes", [(1, 1, 1), (5, 7, 6), (13, 100, 301), (130, 193, 1033), (9, 49, 515), (16, 96, 64)]
    )
    def test_products_of_any_strides(self, sizes: tuple[int, int, int]) -> None:
        """Also of an odd depth, whose last pair has one element."""
        rows, columns, depth = sizes
        for left, right in itertools.product(("rows", "columns", "strided"), repeat=2):
            a, b = factor(rows, depth, left, torch.bfloat16), factor(depth, columns, right, torch.bfloat16)
            exact = a.double() @ b.double()
            bound = 1e-6 * depth**0.5 * (a.double().abs() @ b.double().abs())
            wide = torch.full((rows + 1, columns + 5), 7.0)
            out = wide[:rows, 2 : columns + 2]
            torch.ops.memkern.matmul_rows(out, a, b)
            assert ((out - exact).abs() <= bound).all()
            once = out.clone()
            torch.ops.memkern.matmul_rows(out, a, b, True)
            assert ((out - 2 * exact).abs() <= 3 * bound).all()
            rounded = wide.bfloat16()
            torch.ops.memkern.matmul_rows(rounded[:rows, 2 : columns + 2], a, b)
            assert torch.equal(rounded[:rows, 2 : columns + 2], once.bfloat16())
            for written in (wide, rounded):
                written[:rows, 2 : columns + 2] = 7.0
                assert (written == 7.0).all()  # nothing beside the output was written

    def test_a_last_pair_reads_nothing_behind_it(self) -> None:
        wide = torch.full((6, 8), torch.nan).bfloat16()
        wide[:, :7] = 1.0
        out = torch.empty(6, 6)
        torch.ops.memkern.matmul_rows(out, wide[:, :7], wide[:, :7].t())
        assert (out == 7).all()

    def test_no_depth(self) -> None:
        out = torch.ones(3, 5).bfloat16()
        torch.ops.memkern.matmul_rows(out, torch.empty(3, 0).bfloat16(), torch.empty(0, 5).bfloat16())
        assert (out == 0).all()

    def test_other_dtypes_are_refused(self) -> None:
        out, a, b = torch.empty(3, 5), torch.randn(3, 8).bfloat16(), torch.randn(8, 5).bfloat16()
        with pytest.raises(RuntimeError, match="both in bfloat16"):
            torch.ops.memkern.matmul_rows(out, a, b.float())
        with pytest.raises(RuntimeError, match="an output of float32"):
            torch.ops.memkern.matmul_rows(out.bfloat16(), a, b, True)
        with pytest.raises(RuntimeError, match="an output of float32"):
            torch.ops.memkern.matmul_rows(out.bfloat16(), a.float(), b.float())


def test_no_depth_and_no_rows() -> None:
    out = torch.ones(3, 5)
    torch.ops.memkern.matmul_rows(out, torch.empty(3, 0), torch.empty(0, 5), True)
    assert (out == 1).all()
    torch.ops.memkern.matmul_rows(out, torch.empty(3, 0), torch.empty(0, 5))
    assert (out == 0).all()
    torch.ops.memkern.matmul_rows(torch.empty(0, 5), torch.empty(0, 4), torch.randn(4, 5))


def test_a_row_does_not_depend_on_the_others() -> None:
    """Also of an output that is streamed past the caches."""
    a, b = torch.randn(600, 96), torch.randn(96, 768)
    whole, alone = torch.empty(600, 768), torch.empty(3, 768)
    torch.ops.memkern.matmul_rows(whole, a, b)
    torch.ops.memkern.matmul_rows(alone, a[200:203], b)
    assert torch.equal(whole[200:203], alone)
    assert torch.allclose(whole, a @ b, atol=1e-4)


def test_what_is_not_finite_stays_in_its_row() -> None:
    a, b = torch.randn(9, 20), torch.randn(20, 50)
    a[4, 7] = torch.nan
    out = torch.empty(9, 50)
    torch.ops.memkern.matmul_rows(out, a, b)
    assert out[4].isnan().all()
    assert out[torch.arange(9) != 4].isfinite().all()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="matmul_rows"):
        torch.ops.memkern.matmul_rows(torch.empty(3, 4), torch.empty(3, 5), torch.empty(4, 4))
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.memkern.matmul_rows(*(torch.empty(3, 3, dtype=torch.float64) for _ in range(3)))


class TestRecycledMemory:
    def test_a_dropped_block_serves_the_next_tensor_of_its_size(self) -> None:
        made = torch.ops.memkern.empty_recycled([3, 1001])
        assert made.shape == (3, 1001)
        assert made.is_contiguous()
        address = made.data_ptr()
        part = made[1]
        del made
        # A view keeps its block.
        assert torch.ops.memkern.empty_recycled([3, 1001]).data_ptr() != address
        del part
        addresses = {x.data_ptr() for x in [torch.ops.memkern.empty_recycled([3, 1001]) for _ in range(2)]}
        assert address in addresses
        assert len(addresses) == 2

    def test_it_is_a_tensor_like_any_other(self) -> None:
        made = torch.ops.memkern.empty_recycled([4, 300]).fill_(2.0)
        other = copy.deepcopy(made)
        weight = torch.nn.Parameter(torch.zeros(4, 300))
        weight.grad = made
        torch.optim.SGD([weight], lr=0.5).step()
        assert (weight == -1).all()
        assert torch.equal(other, made)
        made.share_memory_()
        assert torch.equal(other, made)

    def test_many_are_dropped_at_once(self) -> None:
        held = [torch.ops.memkern.empty_recycled([1000 + i]).fill_(float(i)) for i in range(40)]
        assert all((x == i).all() for i, x in enumerate(held))
