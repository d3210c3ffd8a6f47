"""Expert updates: inputs, least traffic and arithmetic, the matrix products alone, and what users write instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Cost, Gemm, OpSpec, Options, Shape, Target, Work, draw


def make_update(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    rows, experts, slots, width = (shape[letter] for letter in "BKSD")
    scale = 1 / math.sqrt(max(width, 1))
    made: dict[str, Any] = {
        "states": draw(generator, dtype, rows, experts, slots, width),
        "hiddens": draw(generator, dtype, rows, slots, width),
        "probs": draw(generator, torch.float32, rows, experts).softmax(-1).to(dtype),
        "gate_weight": draw(generator, dtype, experts, width, 2 * width, scale=scale),
        "gate_bias": draw(generator, dtype, experts, width, scale=0.3),
        "update_weight": draw(generator, dtype, experts, width, 2 * width, scale=scale),
        "update_bias": draw(generator, dtype, experts, width, scale=0.3),
    }
    if options.get("mask"):
        made["row_mask"] = torch.rand(rows, generator=generator, device=device) > 0.3
    if "save" in options:
        made["save"] = options["save"]
    return made


def work_update(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """Weights, states and hiddens once each way; what is kept for backward are the gates and the updates."""
    rows, experts, slots, width = (shape[letter] for letter in "BKSD")
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    weights, biases = 4 * experts * width * width * e, 2 * experts * width
    states, hiddens, probs = (
        size * e for size in (rows * experts * slots * width, rows * slots * width, rows * experts)
    )
    flops = 8 * experts * rows * slots * width * width
    mask = rows if options.get("mask") else 0
    inputs = weights + biases * e + states + hiddens + probs + mask
    saved = 0 if options.get("save") == "none" else 2 * states
    again = flops if options.get("save") == "none" else 0
    return Work(
        Cost(inputs, states, flops),
        Cost(inputs + saved + states, weights + biases * f + states + hiddens + rows * experts * f, 2 * flops + again),
        saved,
    )


def gemms_update(shape: Shape, options: Options, mode: str) -> Sequence[Gemm]:
    """Forward one product per expert, from [M;h] to both pre-activations; backward one to its input, one to weights."""
    rows, experts, width = shape["B"] * shape["S"], shape["K"], 2 * shape["D"]
    forward = [Gemm(rows, width, width, experts)]
    backward = [Gemm(rows, width, width, experts), Gemm(width, width, rows, experts)]
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]


def eager_update(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    update_weight: Tensor,
    update_bias: Tensor,
    row_mask: Tensor | None = None,
    save: str = "activations",
) -> Tensor:
    """A list of experts with two linear layers each, as it is usually written."""
    updated = []
    for k in range(states.shape[1]):
        both = torch.cat((states[:, k], hiddens), -1)
        g = torch.sigmoid(F.linear(both, gate_weight[k], gate_bias[k]))
        u = torch.tanh(F.linear(both, update_weight[k], update_bias[k]))
        a = probs[:, k, None, None] * g
        updated.append(a * u + (1 - a) * states[:, k])
    out = torch.stack(updated, 1)
    return out if row_mask is None else torch.where(row_mask[:, None, None, None], out, states)


def clean_update(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    update_weight: Tensor,
    update_bias: Tensor,
    row_mask: Tensor | None = None,
    save: str = "activations",
) -> Tensor:
    """All experts in one batched product over stacked weights: the form that torch.compile is given."""
    batch, experts, slots, width = states.shape
    both = torch.cat((states, hiddens[:, None].expand_as(states)), -1).transpose(0, 1)
    weight, bias = torch.cat((gate_weight, update_weight), 1), torch.cat((gate_bias, update_bias), 1)
    z = torch.baddbmm(bias[:, None], both.reshape(experts, batch * slots, 2 * width), weight.transpose(1, 2))
    g, u = z.view(experts, batch, slots, 2 * width).transpose(0, 1).split(width, -1)
    a = probs[..., None, None] * torch.sigmoid(g)
    out = a * torch.tanh(u) + (1 - a) * states
    return out if row_mask is None else torch.where(row_mask[:, None, None, None], out, states)


def make_aggregate(*arguments: Any) -> dict[str, Any]:
    made = make_update(*arguments)
    return {"states": made["states"], "probs": made["probs"]}


def work_aggregate(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    rows, experts, slots, width = (shape[letter] for letter in "BKSD")
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    states, out, probs = rows * experts * slots * width, rows * slots * width, rows * experts
    return Work(
        Cost((states + probs) * e, out * e, 2 * states),
        Cost((states + probs + out) * e, states * e + probs * f, 3 * states),
    )


def eager_aggregate(states: Tensor, probs: Tensor) -> Tensor:
    return (probs[..., None, None] * states).sum(1)


def make_ids(shape: Shape, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Each slot's id stands at about one position of a row, as memory tokens do."""
    rows, tokens, slots = (shape[letter] for letter in "BTS")
    ids = torch.randint(0, 30000, (rows, tokens), generator=generator, device=device)
    slot_ids = torch.arange(32000, 32000 + slots, device=device)
    if tokens and slots:
        places = torch.randint(0, tokens, (rows, slots), generator=generator, device=device)
        ids = ids.scatter(1, places, slot_ids.expand(rows, slots))
    return {"input_ids": ids, "slot_ids": slot_ids}


def make_gather(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    hiddens = draw(generator, dtype, shape["B"], shape["T"], shape["D"])
    return {"hiddens": hiddens} | make_ids(shape, device, generator)


def make_scatter(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    sequence = draw(generator, dtype, shape["B"], shape["T"], shape["D"])
    slots = draw(generator, dtype, shape["B"], shape["S"], shape["D"])
    return {"sequence": sequence, "slots": slots} | make_ids(shape, device, generator)


def work_gather(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    rows, tokens, slots, width = (shape[letter] for letter in "BTSD")
    e, ids = dtype.itemsize, 8 * (rows * tokens + slots)
    found, sequence = min(slots, tokens) * rows * width * e, rows * tokens * width * e
    out = rows * slots * width * e
    return Work(Cost(found + ids, out, rows * slots * width), Cost(out + ids, sequence, rows * slots * width))


def work_scatter(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    rows, tokens, slots, width = (shape[letter] for letter in "BTSD")
    e, f, ids = dtype.itemsize, 8 if dtype == torch.float64 else 4, 8 * (rows * tokens + slots)
    sequence, values = rows * tokens * width, rows * slots * width
    return Work(Cost(sequence * e + ids, sequence * e, 0), Cost(sequence * e + ids, sequence * e + values * f, values))


def eager_gather(hiddens: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    match = (input_ids[:, None] == slot_ids[:, None]).to(hiddens.dtype)
    return match @ hiddens / match.sum(-1, keepdim=True).clamp(min=1)


def eager_scatter(sequence: Tensor, slots: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    match = input_ids[..., None] == slot_ids
    if match.shape[-1] == 0:
        return sequence.clone()
    picked = slots.gather(1, match.int().argmax(-1)[..., None].expand(-1, -1, slots.shape[-1]))
    return torch.where(match.any(-1)[..., None], picked, sequence)


_UPDATES = {
    "tiny": {"B": 2, "K": 3, "S": 4, "D": 16},
    "odd": {"B": 3, "K": 2, "S": 5, "D": 37},
    "one": {"B": 1, "K": 1, "S": 1, "D": 1},
    "empty": {"B": 0, "K": 2, "S": 3, "D": 8},
    "small": {"B": 8, "K": 4, "S": 16, "D": 768},
    "medium": {"B": 32, "K": 4, "S": 64, "D": 768},
    "large": {"B": 64, "K": 8, "S": 128, "D": 1024},
    "experts-2": {"B": 8, "K": 2, "S": 16, "D": 768},
    "experts-8": {"B": 8, "K": 8, "S": 16, "D": 768},
    "experts-16": {"B": 8, "K": 16, "S": 16, "D": 768},
}
_TOKENS = {
    "tiny": {"B": 2, "T": 9, "S": 3, "D": 16},
    "odd": {"B": 3, "T": 19, "S": 5, "D": 37},
    "one": {"B": 1, "T": 1, "S": 1, "D": 1},
    "empty": {"B": 0, "T": 4, "S": 2, "D": 8},
    "small": {"B": 4, "T": 384, "S": 16, "D": 768},
    "medium": {"B": 32, "T": 512, "S": 32, "D": 768},
    "large": {"B": 64, "T": 1024, "S": 64, "D": 1024},
}
_ODD = ("odd", "one", "empty")
_CPU = tuple(
    Target(size, mode, "gemm", share, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for sizes, forward in ((("small", "experts-2", "experts-8", "experts-16"), 1 / 1.2), (("medium",), 1 / 1.15))
    for size in sizes
    for mode, share in (("fwd", forward), ("fwd+bwd", 1 / 1.25))
)
_NEVER_SLOWER = tuple(
    Target(size, mode, "eager", 1.0, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for size in ("small", "medium", "experts-2", "experts-8", "experts-16")
    for mode in ("fwd", "fwd+bwd")
)

SPECS = (
    OpSpec(
        name="update_experts",
        column="expert_update",
        shapes=_UPDATES,
        odd=_ODD,
        variants={"": {}, "masked": {"mask": True}, "recompute": {"save": "none"}},
        make=make_update,
        work=work_update,
        eager=eager_update,
        clean=clean_update,
        gemms=gemms_update,
        headline=True,
        targets=(
            *_CPU,
            *_NEVER_SLOWER,
            Target("large", "fwd", "gemm", 1 / 1.1, device="cuda", dtype="bfloat16"),
            Target("large", "fwd", "compile", 1.3, device="cuda", dtype="bfloat16"),
            Target("large", "fwd+bwd", "compile", 1.2, device="cuda", dtype="bfloat16"),
            Target("small", "fwd+bwd", "compile", 2.0, device="cuda", dtype="bfloat16"),
            Target("small", "fwd+bwd", "eager", 8.0, device="cuda", dtype="bfloat16"),
        ),
    ),
    OpSpec(
        name="aggregate_experts",
        column="expert_update",
        shapes=_UPDATES,
        odd=_ODD,
        make=make_aggregate,
        work=work_aggregate,
        eager=eager_aggregate,
    ),
    OpSpec(
        name="gather_slots",
        column="expert_update",
        shapes=_TOKENS,
        odd=_ODD,
        make=make_gather,
        work=work_gather,
        eager=eager_gather,
    ),
    OpSpec(
        name="scatter_slots",
        column="expert_update",
        shapes=_TOKENS,
        odd=_ODD,
        make=make_scatter,
        work=work_scatter,
        eager=eager_scatter,
    ),
)
