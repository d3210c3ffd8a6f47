"""How weights over the slots arise: by content, sharpened, and by allocation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkern import backends
from memkern.ops import _checks
from memkern.ops._library import needs_reference
from memkern.ops.memory._parts import run
from memkern.reference import memory as reference
from memkern.reference._common import compute_dtype

for _op in ("content_weights", "sharpen", "allocation_weights"):
    backends.declare(_op, cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)


def content_weights(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    *,
    slot_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax over the slots of strength times the cosine of key and slot, per head.

    Cosines use x / sqrt(|x|^2 + 1e-12): a zero row scores 0 and has a finite gradient.

    Args:
        memory: (B, N, W) float.
        keys: (B, H, W) float; H heads, of reading or of writing.
        strengths: (B, H) float, >= 0.
        slot_mask: (B, N) bool, True for slots that take part. With every slot masked the weights are zero.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, H, N) in the dtype of ``memory``.

    Raises:
        ValueError: wrong rank, size, dtype, device or value; the message names the argument.
        TypeError: an argument of the wrong type, or a mask that is not bool.
        BackendUnavailable: the explicit backend cannot take the call.

    Source: Graves et al. (2016), Methods, "Content-based addressing".
    """
    _checks.floating("memory", memory, ("B", "N", "W"))
    batch, slots, width = memory.shape
    _checks.floating("keys", keys, (batch, "H", width), memory, "memory")
    _checks.floating("strengths", strengths, (batch, keys.shape[1]), memory, "memory")
    if slot_mask is not None:
        _checks.mask("slot_mask", slot_mask, (batch, slots), memory, "memory")
    if _checks.values_enabled():
        _checks.no_nan("memory", memory, None if slot_mask is None else slot_mask[..., None])
        _checks.no_nan("keys", keys)
        _checks.first_bad("strengths", ~(strengths >= 0), "values >= 0", strengths)
    chosen = backends.select("content_weights", backend, memory, keys, strengths)
    if chosen == "reference" or needs_reference():
        return reference.content_weights(memory, keys, strengths, slot_mask=slot_mask)
    return run("content_weights", chosen, memory, keys, strengths, slot_mask).to(memory.dtype)


def sharpen(weights: Tensor, gamma: float | Tensor, *, backend: str | None = None) -> Tensor:
    """w^gamma / sum w^gamma over the last axis; a row of zeros stays zero.

    A higher exponent is never less focused. The gradient at w = 0 is 0. No power under- or overflows: they are taken as
    logarithms, relative to the largest.

    Args:
        weights: (..., N) float, >= 0.
        gamma: > 0; a float, or a float tensor that broadcasts to ``weights`` without its last axis, such as (B, H) for
            (B, H, N).
        backend: see :mod:`memkern.backends`.

    Returns:
        (..., N) in the dtype of ``weights``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves, Wayne, Danihelka, "Neural Turing Machines" (2014), equation 9.
    """
    weights = _checks.tensor("weights", weights)
    if weights.dim() < 1:
        _checks.fail("weights", "shape (..., N)", weights)
    _checks.floating("weights", weights, (None,) * weights.dim())
    exponent = check_exponent("gamma", gamma, tuple(weights.shape[:-1]), weights, "weights")
    if _checks.values_enabled():
        _checks.first_bad("weights", ~(weights >= 0), "values >= 0", weights)
        if isinstance(exponent, Tensor):
            _checks.positive("gamma", exponent)
    chosen = backends.select("sharpen", backend, weights, exponent if isinstance(exponent, Tensor) else None)
    if chosen == "reference" or needs_reference():
        return reference.sharpen(weights, exponent)
    dtype = compute_dtype(weights)
    count = math.prod(weights.shape[:-1])
    rows = weights.reshape(count, weights.shape[-1])
    if isinstance(exponent, Tensor):
        each = exponent.to(dtype).expand(weights.shape[:-1]).reshape(-1)
    else:
        each = torch.full((count,), exponent, dtype=dtype, device=weights.device)
    return run("sharpen", chosen, rows, each).reshape(weights.shape).to(weights.dtype)


def check_exponent(
    name: str, value: float | Tensor, rows: tuple[int, ...], like: Tensor, like_name: str
) -> float | Tensor:
    """An exponent > 0: a finite number, or a floating tensor that broadcasts to ``rows``."""
    if isinstance(value, Tensor):
        given = _checks.floating(name, value, (None,) * value.dim(), like, like_name)
        sizes = zip(reversed(given.shape), reversed(rows), strict=False)
        if given.dim() > len(rows) or any(a not in (1, b) for a, b in sizes):
            _checks.fail(name, f"a number or a shape that broadcasts to {rows}", given)
        return given
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        _checks.fail_type(name, "a float or a tensor", value)
    if not value > 0 or value == float("inf"):
        _checks.fail(name, "a finite number > 0", value)
    return value


def allocation_weights(usage: Tensor, *, backend: str | None = None) -> Tensor:
    """Weights towards the least used slots: (1 - u_i) times the usage of every slot that is used less.

    Ties go to the lowest slot, and the order carries no gradient. Usage enters as 1e-6 + (1 - 1e-6) u. The weights sum
    to at most 1, and are all zero when every slot is fully used.

    Args:
        usage: (B, N) float in [0, 1].
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, N) in the dtype of ``usage``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Dynamic memory allocation".
    """
    _checks.floating("usage", usage, ("B", "N"))
    if _checks.values_enabled():
        _checks.in_range("usage", usage, 0.0, 1.0)
    chosen = backends.select("allocation_weights", backend, usage)
    if chosen == "reference" or needs_reference():
        return reference.allocation_weights(usage)
    return run("allocation_weights", chosen, usage).to(usage.dtype)
