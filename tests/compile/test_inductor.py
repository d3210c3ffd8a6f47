"""Our operators between the kernels of Inductor, with symbolic sizes: what they hand over and take is as they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memkern import ops
from memkern.ops import MemoryInterface, MemoryState

IDS, SLOT_IDS = torch.tensor([[7, 5, 9, 7]]), torch.tensor([7, 9, 7])


def route(x: Tensor, weight: Tensor, bias: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    found = ops.route_experts(
        x, weight, bias, temperature=0.7, pooling="attention", pool_query=query, slot_mask=mask, row_mask=mask[:, 0]
    )
    return (found.probs**2).sum() + found.logits.sum() + found.entropy.sum() + found.load_balance_loss


def write_update_read_splice(x: Tensor, states: Tensor, probs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    ids = IDS.expand(x.shape[0], -1)
    hiddens = ops.gather_slots(x, ids, SLOT_IDS)
    states = ops.update_experts(states, hiddens, probs, weight, bias, 2 * weight, None, save="none")
    return ops.scatter_slots(x, ops.aggregate_experts(states, probs), ids, SLOT_IDS).square().sum()


def scan(*fields: Tensor) -> Tensor:
    mask = fields[-1]
    reads, new = ops.memory_scan(MemoryState(*fields[:6]), MemoryInterface(*fields[6:-1]), step_mask=mask)
    return reads.square().sum() + sum(field.square().sum() for field in new)


def search(queries: Tensor, rows: Tensor, valid: Tensor, query_group: Tensor, row_group: Tensor) -> Tensor:
    groups = {"query_group": query_group, "row_group": row_group}
    found = ops.cosine_topk(queries, rows, 4, valid=valid, min_score=-0.9, **groups)
    return found.scores.square().sum() + ops.inverse_norms(rows).sum() + (found.indices * 0).sum()


def attend_and_fuse(q: Tensor, k: Tensor, gate: Tensor, indices: Tensor) -> Tensor:
    found = ops.retrieved_attention(q, k, k, indices=indices).flatten(0, 1)
    return ops.fuse_sources([q.flatten(0, 1), found], gate).square().sum()


def arguments(name: str, size: int) -> list[Tensor]:
    if name == "route":
        mask = torch.rand(size, 3) > 0.3
        return [torch.randn(size, 3, 16), torch.randn(5, 16), torch.randn(5), torch.randn(16), mask]
    if name == "write_update_read_splice":
        states, probs = torch.randn(size, 2, 3, 16), torch.rand(size, 2)
        return [torch.randn(size, 4, 16), states, probs, torch.randn(2, 16, 32) / 4, torch.randn(2, 16)]
    if name == "scan":
        from memkern.benchmarks import registry

        made = registry.spec("memory_scan").case({"B": size, "N": 6, "W": 4, "R": 2, "H": 1, "T": 3}).arguments()
        return [*(x.detach() for x in (*made["state"], *made["interface"])), torch.rand(size, 3) > 0.3]
    if name == "search":
        rows = 5 * size
        groups = [torch.zeros(size, dtype=torch.int64), (torch.rand(rows) > 0.9).long()]
        return [torch.randn(size, 8), torch.randn(rows, 8), torch.rand(rows) > 0.2, *groups]
    indices = torch.randint(-1, 7, (2, 2, size, 3))
    return [torch.randn(2, 2, size, 8), torch.randn(2, 2, 6, 8), torch.randn(4, size, 2), indices]


@pytest.mark.parametrize(
    "function", [route, write_update_read_splice, scan, search, attend_and_fuse], ids=lambda f: f.__name__
)
def test_dynamic_sizes(function: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for size in (3, 7):
        inputs = arguments(function.__name__, size)
        leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
        actual = torch.autograd.grad(compiled(*inputs), leaves)
        for a, e in zip(actual, torch.autograd.grad(function(*inputs), leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
