"""Checks of the routing column's arguments: each message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from memkern.ops import _checks
from memkern.ops._library import in_plain_eager

POOLINGS = ("mean", "max", "attention")
MAX_EXPERTS = 256
NO_CLAMP = float("inf")


def check_route(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    pooling: str,
    pool_query: Tensor | None,
    slot_mask: Tensor | None,
    row_mask: Tensor | None,
    clamp: float | None,
    process_group: ProcessGroup | None,
) -> float | Tensor:
    """Every check of route_experts, with its message; :func:`plainly_fine` decides whether it has to run.

    Returns:
        the temperature to use.
    """
    _checks.floating("hiddens", hiddens, ("B", "S", "D"))
    rows, slots, width = hiddens.shape
    _checks.floating("weight", weight, ("K", width), hiddens, "hiddens")
    experts = weight.shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        _checks.fail("weight", f"1 <= K <= {MAX_EXPERTS} rows", weight)
    if bias is not None:
        _checks.floating("bias", bias, (experts,), hiddens, "hiddens")
    temperature = _checks.temperature(temperature, hiddens, "hiddens")
    _checks.choice("pooling", pooling, POOLINGS)
    if pooling == "attention":
        if pool_query is None:
            _checks.fail("pool_query", f"a ({width},) tensor for pooling='attention'", pool_query)
        _checks.floating("pool_query", pool_query, (width,), hiddens, "hiddens")
    elif pool_query is not None:
        _checks.fail("pool_query", f"None for pooling={pooling!r}", pool_query)
    if slot_mask is not None:
        _checks.mask("slot_mask", slot_mask, (rows, slots), hiddens, "hiddens")
    if row_mask is not None:
        _checks.mask("row_mask", row_mask, (rows,), hiddens, "hiddens")
    check_clamp(clamp)
    check_group(process_group)
    if _checks.values_enabled():
        _checks.no_nan("hiddens", hiddens, None if slot_mask is None else slot_mask[..., None])
        for name, value in (("weight", weight), ("bias", bias), ("pool_query", pool_query)):
            _checks.no_nan(name, value)
        if isinstance(temperature, Tensor):
            _checks.positive("temperature", temperature)
    return temperature


def check_clamp(clamp: float | None) -> None:
    """``clamp`` is a number > 0, or None."""
    if clamp is None:
        return
    if isinstance(clamp, bool) or not isinstance(clamp, int | float):
        _checks.fail_type("clamp", "a float or None", clamp)
    if not clamp > 0:
        _checks.fail("clamp", "a number > 0, or None for no clamp", clamp)


def check_group(process_group: ProcessGroup | None) -> None:
    """``process_group`` is one of torch's, or None."""
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        _checks.fail_type("process_group", "a torch.distributed.ProcessGroup or None", process_group)


def check_rows(name: str, value: Any) -> None:
    """``value`` is a floating tensor (..., K) with K >= 1."""
    value = _checks.tensor(name, value)
    if value.dtype not in _checks.FLOATS:
        _checks.fail(name, "a floating dtype (float32, bfloat16, float16 or float64)", value)
    if value.dim() < 1 or value.shape[-1] == 0:
        _checks.fail(name, "shape (..., K) with K >= 1", value)


def plainly_fine(
    hiddens: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, clamp: float | None
) -> bool:
    """The frequent call in few comparisons: CPU tensors of one dtype that fit, and nothing around the call.

    Most of such a call's time is what surrounds the kernel, so that each look at a tensor counts; a shape costs as much
    as ten of the others. False means: look closer.
    """
    if not (type(hiddens) is Tensor and type(weight) in _checks._PLAIN and hiddens.dim() == 3 and weight.dim() == 2):
        return False
    dtype = hiddens.dtype
    experts, width = weight.shape
    return (
        dtype in _checks.FLOATS
        and weight.dtype is dtype
        and hiddens.is_cpu
        and weight.is_cpu
        and 0 < experts <= MAX_EXPERTS
        and width == hiddens.shape[2]
        and (
            bias is None
            or (
                type(bias) in _checks._PLAIN
                and bias.dtype is dtype
                and bias.is_cpu
                and bias.dim() == 1
                and bias.numel() == experts
            )
        )
        and type(temperature) is float
        and 0.0 < temperature < NO_CLAMP
        and (clamp is None or (type(clamp) is float and clamp > 0.0))
        and not _checks.values_enabled()
        and in_plain_eager()
    )
