"""Runs a part of a memory step on a compiled backend, with its backward and, for double backward, the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops.memory import _schemas
from memkern.reference import memory as reference
from memkern.reference._common import compute_dtype


@dataclass(frozen=True)
class Part:
    """Raw operators by backend, and the same function of the same inputs (and option) in the reference."""

    forward: dict[str, Callable[..., Any]]
    backward: dict[str, Callable[..., Any]]
    reference: Callable[..., Any]
    saves_output: bool = False
    has_option: bool = False


PARTS = {
    "content_weights": Part(
        _schemas.CONTENT_FWD,
        _schemas.CONTENT_BWD,
        lambda memory, keys, strengths, slot_mask: reference.content_weights(
            memory, keys, strengths, slot_mask=slot_mask
        ),
        saves_output=True,
    ),
    "sharpen": Part(_schemas.SHARPEN_FWD, _schemas.SHARPEN_BWD, reference.sharpen, saves_output=True),
    "allocation_weights": Part(_schemas.ALLOCATION_FWD, _schemas.ALLOCATION_BWD, reference.allocation_weights),
    "update_usage": Part(
        _schemas.USAGE_FWD,
        _schemas.USAGE_BWD,
        lambda usage, write, read, gates, detach: reference.update_usage(
            usage, write, read, gates, detach_write=detach
        ),
        has_option=True,
    ),
    "update_links": Part(_schemas.LINKS_FWD, _schemas.LINKS_BWD, reference.update_links),
    "directional_weights": Part(_schemas.DIRECTIONAL_FWD, _schemas.DIRECTIONAL_BWD, reference.directional_weights),
    "read_memory": Part(_schemas.READ_FWD, _schemas.READ_BWD, reference.read_memory),
    "write_memory": Part(_schemas.WRITE_FWD, _schemas.WRITE_BWD, reference.write_memory),
}


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, backend: str, option: bool, *inputs: Tensor | None) -> Any:
        outputs = PARTS[name].forward[backend](*inputs)
        kept = (outputs,) if PARTS[name].saves_output else ()
        ctx.save_for_backward(*inputs, *kept)
        ctx.name, ctx.backend, ctx.option, ctx.inputs = name, backend, option, len(inputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        part, inputs, kept = PARTS[ctx.name], ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        option = (ctx.option,) if part.has_option else ()
        needed = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * (3 + ctx.inputs)
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            outputs = part.reference(*inputs, *option)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = list(zip(inputs, needed, strict=True))
            return (None, None, None, *differentiable_backward(outputs, grads, wanted))
        found = part.backward[ctx.backend](*grads, *inputs, *option, *kept)
        found = [found] if isinstance(found, Tensor) else list(found)
        # A mask, where there is one, stands last among the inputs and has no gradient.
        found += [None] * (ctx.inputs - len(found))
        return (None, None, None, *(grad if need else None for grad, need in zip(found, needed, strict=True)))


def run(name: str, backend: str, *inputs: Tensor | None, option: bool = False) -> Any:
    """The part's results in float32 (float64 for float64), differentiable in every floating input."""
    dtype = compute_dtype(*inputs)
    cast = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
    if any(x is not None and x.numel() == 0 for x in cast):
        # No batch, slot or head: nothing to launch, and the reference connects the empty result to its inputs.
        return PARTS[name].reference(*cast, *((option,) if PARTS[name].has_option else ()))
    if gradient_needed(*cast):
        return _Part.apply(name, backend, option, *cast)
    return PARTS[name].forward[backend](*cast)
