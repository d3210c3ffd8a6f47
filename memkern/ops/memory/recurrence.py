"""One step of the memory, and the scan over many: checks, the choice of a backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkern import backends
from memkern.ops import _checks
from memkern.ops._autograd import differentiable_backward, gradient_needed
from memkern.ops._library import needs_reference
from memkern.ops.memory import _arguments
from memkern.ops.memory._schemas import SCAN_BWD, SCAN_FWD, STEP_BWD, STEP_FWD
from memkern.reference import memory as reference
from memkern.reference._common import compute_dtype
from memkern.reference.memory import MemoryInterface, MemoryState

backends.declare("memory_step", cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)
backends.declare("memory_scan", cpp=backends.ALL, triton=backends.LOW, cuda=backends.LOW)

_STATE = len(MemoryState._fields)
_INTERFACE = len(MemoryInterface._fields)
# Where the raw forward's results stand: reads, the state's fields, then what is saved.
_USAGE, _LINKS, _PRECEDENCE, _SAVED = 2, 3, 4, 1 + _STATE
# What backward of a step reads besides the saved rows: memory, usage, read and write weights after the step.
_STEP_REREADS = (1, 2, 5, 6)


def initial_memory_state(
    batch: int,
    slots: int,
    width: int,
    read_heads: int,
    write_heads: int = 1,
    *,
    device: torch.device | str | None = None,
    memory: Tensor | None = None,
) -> MemoryState:
    """A state that was never written: zeros, and ``memory`` (zeros by default) in the slots.

    Args:
        batch: B >= 0.
        slots: N >= 1.
        width: W >= 1.
        read_heads: R >= 1.
        write_heads: H >= 1.
        device: by default that of ``memory``, else torch's default.
        memory: (N, W) or (B, N, W) float: initial content, such as a learned parameter; copied, with a gradient.

    Returns:
        MemoryState in float32; in float64 when ``memory`` is.

    Raises:
        ValueError, TypeError: a bad argument, named.
    """
    for name, value, least in (
        ("batch", batch, 0),
        ("slots", slots, 1),
        ("width", width, 1),
        ("read_heads", read_heads, 1),
        ("write_heads", write_heads, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            _checks.fail_type(name, "an int", value)
        if value < least:
            _checks.fail(name, f"an int >= {least}", value)
    if memory is not None:
        given = _checks.tensor("memory", memory)
        if given.dim() == 2:
            _checks.floating("memory", given, (slots, width))
        else:
            _checks.floating("memory", given, (batch, slots, width))
    if device is not None and not isinstance(device, torch.device):
        if not isinstance(device, str):
            _checks.fail_type("device", "a torch.device or the name of one", device)
        try:
            device = torch.device(device)
        except RuntimeError:
            _checks.fail("device", "a torch.device or the name of one", device)
    return reference.initial_memory_state(batch, slots, width, read_heads, write_heads, device=device, memory=memory)


class _Recurrence(torch.autograd.Function):
    """Both raw operators: a scan when ``every`` is a number of steps, one step when it is 0."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        flags: tuple[bool, bool, bool, bool],
        every: int,
        step_mask: Tensor | None,
        sharpness: Tensor | None,
        *fields: Tensor,
    ) -> tuple[Tensor, ...]:
        results = _forward(backend, flags, every, step_mask, sharpness, fields, True)
        reread = () if every else tuple(results[i] for i in _STEP_REREADS)
        ctx.save_for_backward(step_mask, sharpness, *fields, *reread, *results[_SAVED:])
        ctx.backend, ctx.flags, ctx.every = backend, flags, every
        ctx.set_materialize_grads(False)
        passed_on = _passed_on(flags)
        if passed_on:
            ctx.mark_non_differentiable(*(results[i] for i in passed_on))
        return tuple(results[:_SAVED])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        step_mask, sharpness, *rest = ctx.saved_tensors
        fields, saved = rest[: _STATE + _INTERFACE], rest[_STATE + _INTERFACE :]
        needs_sharpness, *needed = ctx.needs_input_grad[4:]
        passed_on = _passed_on(ctx.flags)
        incoming = [None if i in passed_on else grad for i, grad in enumerate(grads)]
        if all(grad is None for grad in incoming):
            return (None,) * (5 + len(fields))
        if torch.is_grad_enabled():
            # Only under create_graph: the raw backward is not differentiable, the reference is, any number of times.
            reads, state = _reference(ctx.flags, ctx.every, step_mask, sharpness, fields)
            wanted = [(sharpness, needs_sharpness), *zip(fields, needed, strict=True)]
            return (None,) * 4 + tuple(differentiable_backward([reads, *state], incoming, wanted))
        tail = (ctx.every,) if ctx.every else ()
        raw = SCAN_BWD if ctx.every else STEP_BWD
        *found, d_sharpness = raw[ctx.backend](
            *incoming,
            list(fields[:_STATE]),
            list(fields[_STATE:]),
            sharpness,
            step_mask,
            list(saved),
            *ctx.flags,
            *tail,
        )
        for index in passed_on:
            found[index - 1] = None
        return (
            *(None,) * 4,
            d_sharpness if needs_sharpness else None,
            *(grad if need else None for grad, need in zip(found, needed, strict=True)),
        )


def _passed_on(flags: tuple[bool, bool, bool, bool]) -> list[int]:
    """Results that a call with these flags (track_usage, track_links, ...) does not compute."""
    track_usage, track_links, *_ = flags
    return ([] if track_usage else [_USAGE]) + ([] if track_links else [_LINKS, _PRECEDENCE])


def _forward(
    backend: str,
    flags: tuple[bool, bool, bool, bool],
    every: int,
    step_mask: Tensor | None,
    sharpness: Tensor | None,
    fields: tuple[Tensor, ...],
    save: bool,
) -> list[Tensor]:
    state, interface = list(fields[:_STATE]), list(fields[_STATE:])
    if every:
        return SCAN_FWD[backend](state, interface, sharpness, step_mask, *flags[:3], every, save)
    return STEP_FWD[backend](state, interface, sharpness, step_mask, *flags[:3], save)


def _reference(
    flags: tuple[bool, bool, bool, bool],
    every: int,
    step_mask: Tensor | None,
    sharpness: float | Tensor | None,
    fields: Any,
) -> tuple[Tensor, MemoryState]:
    state, interface = MemoryState(*fields[:_STATE]), MemoryInterface(*fields[_STATE:])
    names = ("track_usage", "track_links", "deallocate", "detach_usage")
    options: dict[str, Any] = dict(zip(names, flags, strict=True))
    if every:
        options["checkpoint_every"] = every
        return reference.memory_scan(state, interface, sharpness=sharpness, step_mask=step_mask, **options)
    return reference.memory_step(state, interface, sharpness=sharpness, step_mask=step_mask, **options)


def _recur(
    op: str,
    state: MemoryState,
    interface: MemoryInterface,
    sharpness: float | Tensor | None,
    step_mask: Tensor | None,
    flags: tuple[bool, bool, bool, bool],
    every: int | None,
    backend: str | None,
) -> tuple[Tensor, MemoryState]:
    scan = op == "memory_scan"
    fine = _arguments.plainly_fine(state, interface, scan=scan)
    if fine is None:
        sizes = _arguments.check_state(state)
        lead = _arguments.check_interface(interface, sizes, state.memory, scan=scan)
    else:
        lead, sizes = fine
    step_mask = _arguments.check_step_mask(step_mask, lead, state.memory)
    exponent = _arguments.check_sharpness(sharpness, lead, sizes[3], state.memory)
    for name, flag in zip(("track_usage", "track_links", "deallocate", "detach_usage"), flags, strict=True):
        _checks.flag(name, flag)
    if _checks.values_enabled():
        _arguments.check_values(state, interface, sharpness, step_mask)
    tensor = exponent if isinstance(exponent, Tensor) else None
    if fine is None:
        chosen = backends.select(op, backend, *state, *interface, tensor)
    else:
        chosen = backends.select(op, backend, state.memory, tensor)
    steps = lead[1] if scan else 0
    if scan and every is None:
        every = reference.default_checkpoint_every(steps)
    if chosen == "reference" or needs_reference():
        return _reference(flags, every or 0, step_mask, exponent, (*state, *interface))
    dtype = compute_dtype(state.memory)
    fields: tuple[Tensor, ...] = (*state, *interface)
    if fine is None:
        fields = tuple(field.to(dtype) for field in fields)
    if scan and steps == 0:
        batch, _, heads, width = interface.read_keys.shape
        return interface.read_keys.new_zeros((batch, 0, heads, width)), MemoryState(*fields[:_STATE])
    if tensor is not None:
        tensor = tensor.to(dtype)
    elif isinstance(exponent, int | float):
        tensor = torch.full((*lead, sizes[3]), exponent, dtype=dtype, device=state.memory.device)
    if gradient_needed(tensor, *fields):
        results = _Recurrence.apply(chosen, flags, every or 0, step_mask, tensor, *fields)
    else:
        results = _forward(chosen, flags, every or 0, step_mask, tensor, fields, False)
    new = list(results[1:_SAVED])
    for index in _passed_on(flags):
        new[index - 1] = fields[index - 1]
    return results[0].to(interface.read_keys.dtype), MemoryState(*new)


def memory_step(
    state: MemoryState,
    interface: MemoryInterface,
    *,
    sharpness: float | Tensor | None = None,
    step_mask: Tensor | None = None,
    track_usage: bool = True,
    track_links: bool = True,
    deallocate: bool = False,
    detach_usage: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, MemoryState]:
    """One step of the memory: free and allocate, write, link, read.

    In this order: usage, allocation, write weights, erase and add, links and precedence, content lookup, directional
    reads, the mix of the read modes. Several write heads allocate one after another on simulated usage.

    Args:
        state: what the previous step returned, or :func:`initial_memory_state`; any floating dtypes.
        interface: activations already applied; see :class:`MemoryInterface` for shapes and ranges.
        sharpness: > 0; the final read weights w become w^s / sum w^s. A float, or a tensor (R,) or (B, R). None and
            the float 1 leave them as they are.
        step_mask: (B,) bool. A False row reads zeros and keeps its state bit for bit; neither its state's nor its
            interface's values reach anything else.
        track_usage: False: allocation is 1/N, and usage stays as it is.
        track_links: False: of the read modes only the content share counts, renormalised (zero weights where it is 0),
            and links and precedence stay as they are.
        deallocate: multiply the rows of memory by the retention prod_r (1 - f_r w_r) before the write, lookup included.
        detach_usage: stop the gradient of the new usage through the write weights.
        backend: see :mod:`memkern.backends`.

    Returns:
        reads (B, R, W) in the dtype of ``interface.read_keys``, and the new MemoryState in float32 (float64 for
        float64).

    Raises:
        ValueError: wrong rank, size, dtype, device or value; the message names the argument.
        TypeError: an argument of the wrong type, or a mask that is not bool.
        BackendUnavailable: the explicit backend cannot take the call.

    Source: Graves et al. (2016), Methods.
    """
    flags = (track_usage, track_links, deallocate, detach_usage)
    return _recur("memory_step", state, interface, sharpness, step_mask, flags, None, backend)


def memory_scan(
    state: MemoryState,
    interface: MemoryInterface,
    *,
    sharpness: float | Tensor | None = None,
    step_mask: Tensor | None = None,
    track_usage: bool = True,
    track_links: bool = True,
    deallocate: bool = False,
    detach_usage: bool = False,
    checkpoint_every: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MemoryState]:
    """T steps of the memory at once: equal to T calls of :func:`memory_step`, values and gradients.

    For backward it keeps O(T B N (R + H)) and ceil(T / checkpoint_every) snapshots of links and memory, never T link
    matrices; each segment is recomputed from its snapshot.

    Args:
        state: the state before the first step.
        interface: fields with an axis T after B, such as ``read_keys`` (B, T, R, W).
        sharpness: as for a step; a tensor (R,) or (B, R) belongs to every step, (B, T, R) to one each.
        step_mask: (B, T) bool: the steps that a row takes; (B,) for all of its steps.
        track_usage, track_links, deallocate, detach_usage: as for a step.
        checkpoint_every: steps between snapshots, >= 1; about sqrt(T) by default.
        backend: see :mod:`memkern.backends`.

    Returns:
        reads (B, T, R, W) in the dtype of ``interface.read_keys``, and the state after the last step in float32
        (float64 for float64).

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`memory_step`.

    Source: Graves et al. (2016), Methods; checkpoints after Chen et al., "Training Deep Nets with Sublinear Memory
    Cost" (2016).
    """
    if checkpoint_every is not None:
        if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int):
            _checks.fail_type("checkpoint_every", "an int or None", checkpoint_every)
        if checkpoint_every < 1:
            _checks.fail("checkpoint_every", "an int >= 1, or None for about sqrt(T)", checkpoint_every)
    flags = (track_usage, track_links, deallocate, detach_usage)
    return _recur("memory_scan", state, interface, sharpness, step_mask, flags, checkpoint_every, backend)
