"""``search``: the arguments of a search for the backend under test, and that search."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkern
from memkern.ops import cosine_topk
from memkern.ops.cosine_topk import TopK


class Search:
    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def sized(self, count: int) -> int:
        """A number of queries; small ones stand for both paths of the interpreter."""
        if self.backend.slow and count == 3:
            pytest.skip("the interpreter's 4 stand for it")
        return min(count, 4) if self.backend.slow else count

    def draw(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(size).to(self.backend.device, dtype)

    def arguments(self, shape: Any, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> dict[str, Any]:
        """For (Q, N, D, k)."""
        count, rows, width, k = shape
        queries, database = (self.draw(number, width, dtype=dtype) for number in (count, rows))
        return {"queries": queries.requires_grad_(grad), "database": database.requires_grad_(grad), "k": k}

    def operator(self, **arguments: Any) -> TopK:
        return cosine_topk(**arguments, backend=self.backend.name)

    def run(self, made: dict[str, Any], **options: Any) -> TopK:
        return self.operator(**{**made, **options})


@pytest.fixture
def search(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Skips, with the reason, on a backend that does not implement the search."""
    if reason := memkern.backends.explain("cosine_topk")[backend.name]:
        pytest.skip(f"backend {backend.id}: {reason}")
    if backend.slow:
        # The interpreter takes the path for many queries with four of them.
        monkeypatch.setattr("memkern.triton_kernels.cosine_topk.FEW_QUERIES", 2)
    return Search(backend)


@pytest.fixture
def strided() -> Any:
    return _strided


def _strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "slice":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
        view = wide[..., 1 : 2 * x.shape[-1] : 2]
    elif how == "rows":
        wide = torch.full((2 * x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype, device=x.device)
        view = wide[::2, 3 : 3 + x.shape[1]]
    elif how == "permuted":
        view = torch.empty_like(x.t().contiguous()).t()
    else:
        view = torch.empty(2 * x.numel() + 1, dtype=x.dtype, device=x.device)[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x)
