"""One (K, ...) tensor over the parameters of K equal layers, without a copy where they lie side by side.

The checkpoints name the layers one by one; the operators want them stacked. :func:`pack` moves the parameters of the
layers into one block, each a view of its own part, and :func:`stacked` gives the block itself as a differentiable
tensor. Where the parameters have been moved apart since (another device, a shard, a load), it stacks a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memkern.ops._library import needs_reference


def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Move equal parameters into one block; their values, and the parameter objects, stay."""
    first = parameters[0]
    if first.is_meta or type(first.data) is not Tensor or _block(parameters) is not None:
        return
    if any(p.dtype != first.dtype or p.device != first.device or p.shape != first.shape for p in parameters):
        return
    with torch.no_grad():
        block = torch.stack([p.detach() for p in parameters])
        for parameter, part in zip(parameters, block, strict=True):
            parameter.data = part


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """(K, ...): the parameters as one tensor; a gradient reaches each of them."""
    block = None if torch.compiler.is_compiling() or needs_reference() else _block(parameters)
    return torch.stack(list(parameters)) if block is None else _Block.apply(block, *parameters)


def _block(parameters: Sequence[Tensor]) -> Tensor | None:
    """The block that the parameters fill side by side, or None."""
    first = parameters[0]
    if type(first) not in (Tensor, nn.Parameter) or first.is_meta or not first.is_contiguous():
        return None
    address, size = first.data_ptr(), first.numel() * first.element_size()
    for index, other in enumerate(parameters):
        if other.data_ptr() != address + index * size or other.shape != first.shape or other.dtype != first.dtype:
            return None
    if first.untyped_storage().data_ptr() != parameters[-1].untyped_storage().data_ptr():
        return None
    return first.detach().as_strided((len(parameters), *first.shape), (first.numel(), *first.stride()))


class _Block(torch.autograd.Function):
    """The block as a function of its parts: forward copies nothing, backward hands out the parts of the gradient."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, *parts: Tensor) -> Tensor:
        return block.view_as(block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *grad.unbind(0)
