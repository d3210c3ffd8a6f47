"""What the autograd functions of all operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_backward(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[tuple[Tensor | None, bool]]
) -> list[Tensor | None]:
    """Gradients of a reference's ``outputs`` with a graph of their own, for double backward.

    Args:
        outputs: recomputed by the reference from the saved inputs, in a region where gradients are enabled.
        grads: incoming gradient of each output, None where there is none.
        wanted: the inputs, each with whether its gradient is needed; the result has one entry for each.
    """
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    inputs = [tensor for tensor, needed in wanted if needed and tensor is not None]
    if not pairs or not inputs:
        return [None] * len(wanted)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if needed and tensor is not None else None for tensor, needed in wanted]


def gradient_needed(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see this call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - any() with a generator costs a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its prologue for functorch, which costs 3 us: for calls in plain eager mode alone."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]
