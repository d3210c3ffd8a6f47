"""``memkern.warmup()``: pays ahead of time for what the first call of an operator would pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from memkern.backends import BackendUnavailable
from memkern.benchmarks.registry import DTYPES, Case, OpSpec, override, spec, specs
from memkern.testing.compare import flatten


def warmup(
    ops: Iterable[str] | None = None,
    *,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    device: str | torch.device | None = None,
    shapes: Mapping[str, Mapping[str, int]] | None = None,
    backend: str | None = None,
    backward: bool = True,
) -> list[str]:
    """Run operators once on small inputs, so that kernels are compiled, libraries loaded and workspaces allocated.

    Triton compiles a kernel for its block sizes and for how strides and pointers divide, so a shape that differs much
    from the warmed one may still compile at its first call: pass the shapes of your model in ``shapes``.

    Args:
        ops: names of public operators; all by default.
        dtypes: names of dtypes; those that an operator does not take are passed over.
        device: where the tensors will live; a GPU where there is one, otherwise the CPU.
        shapes: for an operator, dimensions that replace those of its ``small`` shape, such as
            ``{"route_experts": {"D": 4096, "K": 64}}``.
        backend: see :mod:`memkern.backends`; the automatic choice by default.
        backward: warm the gradients too.

    Returns:
        What was run, such as ``"route_experts max small bfloat16"``, in order.

    Raises:
        ValueError: an unknown operator, dimension, dtype or backend.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtypes, shapes = tuple(dtypes), dict(shapes or {})
    chosen = list(specs().values()) if ops is None else [spec(name) for name in ops]
    for name in shapes:
        spec(name)
    done: list[str] = []
    for op in chosen:
        for case in _cases(op, dtypes, device, shapes.get(op.name, {})):
            try:
                _run(case, backend, backward)
            except BackendUnavailable:
                continue  # nothing that a later call could use
            done.append(case.label)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done


def _cases(op: OpSpec, dtypes: tuple[str, ...], device: torch.device, shape: Mapping[str, int]) -> list[Case]:
    base = "small" if "small" in op.shapes else next(iter(op.shapes))
    size = override(op, base, shape) if shape else base
    return [
        op.case(size, variant=variant, dtype=dtype, device=str(device)) for dtype in dtypes for variant in op.variants
        if dtype in op.dtypes or dtype not in DTYPES
    ]  # fmt: skip


def _run(case: Case, backend: str | None, backward: bool) -> None:
    arguments = case.arguments(grad=backward)
    with torch.set_grad_enabled(backward):
        result = case.spec.public(**arguments, backend=backend)
    outputs = [out for out in flatten(result).values() if out.requires_grad]
    leaves = [leaf for leaf in flatten(arguments).values() if leaf.requires_grad]
    if outputs and leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True)
