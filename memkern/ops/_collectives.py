"""Sums over a process group that autograd can cross."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        from torch.distributed import _functional_collectives as collectives

        ctx.world_size = torch.distributed.get_world_size(group)
        return collectives.wait_tensor(collectives.all_reduce(local, "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.world_size, None


def global_sum(local: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``local`` over the ranks, the same bits on each of them.

    Its gradient is the rank's own times the world size: DDP's mean over ranks then equals one process that saw all
    rows.
    """
    return _GlobalSum.apply(local, group)  # type: ignore[no-any-return]


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        from torch.distributed import _functional_collectives as collectives

        ctx.world_size = torch.distributed.get_world_size(group)
        ctx.rank = torch.distributed.get_rank(group)
        # Newer releases call it so; the older name warns there.
        gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
        return collectives.wait_tensor(gather(local[None].contiguous(), 0, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad[ctx.rank] * ctx.world_size, None


def gather_ranks(local: Tensor, group: ProcessGroup) -> Tensor:
    """``local`` of every rank, stacked along a new first axis in rank order.

    The gradient of a rank's own part is multiplied by the world size, that of the others dropped: each rank sees the
    same loss and sends its own part back, so that DDP's mean over ranks equals one process.
    """
    return _GatherRanks.apply(local, group)  # type: ignore[no-any-return]
