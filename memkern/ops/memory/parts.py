"""What a step does with weights: usage, links, directional weights, reading and writing."""

from __future__ import annotations

from torch import Tensor

from memkern import backends
from memkern.ops import _checks
from memkern.ops._library import needs_reference
from memkern.ops.memory._parts import run
from memkern.reference import memory as reference

for _op in ("update_usage", "update_links", "directional_weights", "read_memory", "write_memory"):
    backends.declare(_op, cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)


def update_usage(
    usage: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    free_gates: Tensor,
    *,
    detach_write: bool = False,
    backend: str | None = None,
) -> Tensor:
    """(u + w - u w) psi: what was written is used, what was read and freed is free again.

    w = 1 - prod_h (1 - w_h) over the write heads, psi = prod_r (1 - f_r w_r) over the read heads.

    Args:
        usage: (B, N) float in [0, 1].
        write_weights: (B, H, N) float, of the previous step.
        read_weights: (B, R, N) float, of the previous step.
        free_gates: (B, R) float in [0, 1].
        detach_write: stop the gradient through ``write_weights`` (and through it alone).
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, N) in the dtype of ``usage``, in [0, 1].

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Dynamic memory allocation".
    """
    _checks.floating("usage", usage, ("B", "N"))
    batch, slots = usage.shape
    _at_least_one_head("write_weights", write_weights, (batch, "H", slots), usage, "usage")
    _at_least_one_head("read_weights", read_weights, (batch, "R", slots), usage, "usage")
    _checks.floating("free_gates", free_gates, (batch, read_weights.shape[1]), usage, "usage")
    _checks.flag("detach_write", detach_write)
    if _checks.values_enabled():
        for name, value in (
            ("usage", usage),
            ("write_weights", write_weights),
            ("read_weights", read_weights),
            ("free_gates", free_gates),
        ):
            _checks.in_range(name, value, 0.0, 1.0 + (1e-2 if "weights" in name else 0.0))
    chosen = backends.select("update_usage", backend, usage, write_weights, read_weights, free_gates)
    if chosen == "reference" or needs_reference():
        return reference.update_usage(usage, write_weights, read_weights, free_gates, detach_write=detach_write)
    inputs = (usage, write_weights, read_weights, free_gates)
    return run("update_usage", chosen, *inputs, option=detach_write).to(usage.dtype)


def update_links(
    links: Tensor, precedence: Tensor, write_weights: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The order of writing: links[i, j] says how much slot i was written right after slot j.

    links[i, j] = (1 - w_i - w_j) links[i, j] + w_i precedence[j], zero on the diagonal; then precedence = (1 - sum w)
    precedence + w. Factors that rounding pushes below zero are zero, so rows and columns of links sum to at most 1.

    Args:
        links: (B, H, N, N) float.
        precedence: (B, H, N) float.
        write_weights: (B, H, N) float, each head's sum at most 1.
        backend: see :mod:`memkern.backends`.

    Returns:
        The new links (B, H, N, N) and precedence (B, H, N), in the dtype of ``links``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Temporal memory linkage".
    """
    _square("links", links)
    shape = links.shape[:3]
    _checks.floating("precedence", precedence, shape, links, "links")
    _checks.floating("write_weights", write_weights, shape, links, "links")
    if _checks.values_enabled():
        for name, value in (("links", links), ("precedence", precedence), ("write_weights", write_weights)):
            _checks.in_range(name, value, 0.0, 1.0 + 1e-2)
    chosen = backends.select("update_links", backend, links, precedence, write_weights)
    if chosen == "reference" or needs_reference():
        return reference.update_links(links, precedence, write_weights)
    updated, followed = run("update_links", chosen, links, precedence, write_weights)
    return updated.to(links.dtype), followed.to(links.dtype)


def directional_weights(links: Tensor, read_weights: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Where reading moves along the links: forward L w to what was written next, backward L^T w to what came before.

    Args:
        links: (B, H, N, N) float.
        read_weights: (B, R, N) float, of the previous step.
        backend: see :mod:`memkern.backends`.

    Returns:
        Forward and backward weights, (B, H, R, N) each, in the dtype of ``links``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Temporal memory linkage".
    """
    _square("links", links)
    _checks.floating("read_weights", read_weights, (links.shape[0], "R", links.shape[2]), links, "links")
    if _checks.values_enabled():
        _checks.in_range("links", links, 0.0, 1.0 + 1e-2)
        _checks.in_range("read_weights", read_weights, 0.0, 1.0 + 1e-2)
    chosen = backends.select("directional_weights", backend, links, read_weights)
    if chosen == "reference" or needs_reference():
        return reference.directional_weights(links, read_weights)
    ahead, back = run("directional_weights", chosen, links, read_weights)
    return ahead.to(links.dtype), back.to(links.dtype)


def read_memory(memory: Tensor, weights: Tensor, *, backend: str | None = None) -> Tensor:
    """Weighted sums of the slots, one per read head.

    Args:
        memory: (B, N, W) float.
        weights: (B, R, N) float.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, R, W) in the dtype of ``memory``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Reading and writing to memory".
    """
    _checks.floating("memory", memory, ("B", "N", "W"))
    _checks.floating("weights", weights, (memory.shape[0], "R", memory.shape[1]), memory, "memory")
    if _checks.values_enabled():
        _checks.no_nan("memory", memory)
        _checks.in_range("weights", weights, 0.0, 1.0 + 1e-2)
    chosen = backends.select("read_memory", backend, memory, weights)
    if chosen == "reference" or needs_reference():
        return reference.read_memory(memory, weights)
    return run("read_memory", chosen, memory, weights).to(memory.dtype)


def write_memory(
    memory: Tensor,
    weights: Tensor,
    erase_vectors: Tensor,
    write_vectors: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Erase, then add: M prod_h (1 - w_h e_h^T) + sum_h w_h v_h^T.

    Args:
        memory: (B, N, W) float.
        weights: (B, H, N) float.
        erase_vectors: (B, H, W) float in [0, 1].
        write_vectors: (B, H, W) float.
        backend: see :mod:`memkern.backends`.

    Returns:
        (B, N, W) in the dtype of ``memory``.

    Raises:
        ValueError, TypeError, BackendUnavailable: a bad argument, named.

    Source: Graves et al. (2016), Methods, "Reading and writing to memory".
    """
    _checks.floating("memory", memory, ("B", "N", "W"))
    batch, slots, width = memory.shape
    _at_least_one_head("weights", weights, (batch, "H", slots), memory, "memory")
    _checks.floating("erase_vectors", erase_vectors, (batch, weights.shape[1], width), memory, "memory")
    _checks.floating("write_vectors", write_vectors, (batch, weights.shape[1], width), memory, "memory")
    if _checks.values_enabled():
        _checks.no_nan("memory", memory)
        _checks.no_nan("write_vectors", write_vectors)
        _checks.in_range("weights", weights, 0.0, 1.0 + 1e-2)
        _checks.in_range("erase_vectors", erase_vectors, 0.0, 1.0)
    chosen = backends.select("write_memory", backend, memory, weights, erase_vectors, write_vectors)
    if chosen == "reference" or needs_reference():
        return reference.write_memory(memory, weights, erase_vectors, write_vectors)
    return run("write_memory", chosen, memory, weights, erase_vectors, write_vectors).to(memory.dtype)


def _at_least_one_head(name: str, value: Tensor, shape: tuple[int | str, ...], like: Tensor, like_name: str) -> None:
    _checks.floating(name, value, shape, like, like_name)
    if value.shape[1] == 0:
        _checks.fail(name, "at least one head", value)


def _square(name: str, value: Tensor) -> None:
    _checks.floating(name, value, ("B", "H", "N", "N"))
    if value.shape[2] != value.shape[3]:
        _checks.fail(name, "shape (B, H, N, N)", value)
