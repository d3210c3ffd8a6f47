"""Routing: inputs, least traffic and arithmetic, and what users write instead."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Cost, OpSpec, Options, Shape, Target, Work, draw

EPS = 1e-10


def make_route(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    rows, slots, width, experts = (shape[letter] for letter in "BSDK")
    made: dict[str, Any] = {
        "hiddens": draw(generator, dtype, rows, slots, width),
        # Logits of about unit size after a mean over S slots, so that rows differ in their expert.
        "weight": draw(generator, dtype, experts, width, scale=math.sqrt(max(slots, 1) / max(width, 1))),
        "bias": draw(generator, dtype, experts, scale=0.1),
        "temperature": 0.7,
        "pooling": options.get("pooling", "mean"),
    }
    if made["pooling"] == "attention":
        made["pool_query"] = draw(generator, dtype, width)
    if options.get("masks"):
        slot_mask = torch.rand(rows, slots, generator=generator, device=device) > 0.3
        slot_mask[:1] = False
        made["slot_mask"] = slot_mask
        made["row_mask"] = torch.rand(rows, generator=generator, device=device) > 0.2
    return made


def work_route(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """One pass over the input forward, one pass over its gradient backward.

    Max pooling writes whole slots of zeros as mean pooling writes whole slots of values. Attention reads the input
    twice backward at most once more than mean does, because each slot's weight has a gradient of its own.
    """
    rows, slots, width, experts = (shape[letter] for letter in "BSDK")
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    attention = options.get("pooling") == "attention"
    hiddens, weight, routed = rows * slots * width * e, experts * width * e, rows * experts
    masks = rows * slots + rows if options.get("masks") else 0
    forward = Cost(
        read=hiddens + weight + experts * e + masks + (width * e if attention else 0),
        written=routed * (e + f) + rows * f + f,
        flops=rows * slots * width * (4 if attention else 1) + 2 * routed * width,
    )
    pooled = rows * width * f if slots != 1 else 0
    saved = routed * f + pooled + experts * f + rows + (rows * slots * f if attention else 0)
    cotangents = routed * (e + f) + rows * f + f
    reread = hiddens if attention or slots == 1 else 0
    backward = Cost(
        read=cotangents + saved + weight + masks + reread,
        written=hiddens + weight + experts * f + (width * f if attention else 0),
        flops=rows * slots * width * (5 if attention else 1) + 4 * routed * width,
    )
    return Work(forward, backward, saved)


def eager_route(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    temperature: float,
    pooling: str,
    pool_query: Tensor | None = None,
    slot_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gating network as it is usually written, with float32 logits."""
    if pooling == "mean":
        if slot_mask is None:
            pooled = hiddens.mean(1)
        else:
            kept = hiddens.masked_fill(~slot_mask[..., None], 0.0)
            pooled = kept.sum(1) / slot_mask.sum(1, keepdim=True).clamp(min=1)
    elif pooling == "max":
        if slot_mask is None:
            pooled = hiddens.max(1).values
        else:
            pooled = hiddens.masked_fill(~slot_mask[..., None], -math.inf).max(1).values
            pooled = pooled.masked_fill(~slot_mask.any(1, keepdim=True), 0.0)
    else:
        assert pool_query is not None
        scores = hiddens @ pool_query / math.sqrt(hiddens.shape[-1])
        if slot_mask is None:
            pooled = (scores.softmax(1)[..., None] * hiddens).sum(1)
        else:
            scores = scores.masked_fill(~slot_mask, torch.finfo(scores.dtype).min)
            kept = hiddens.masked_fill(~slot_mask[..., None], 0.0)
            pooled = (scores.softmax(1)[..., None] * kept).sum(1)
    logits = F.linear(pooled, weight, bias).float().clamp(-10.0, 10.0)
    zero = (pooled.abs() < EPS).all(1, keepdim=True)
    probs = torch.where(zero, 1.0 / weight.shape[0], (logits / temperature).softmax(-1))
    entropy = -(probs * (probs + EPS).log()).sum(-1)
    loss = eager_balance(probs, row_mask)
    return probs.to(hiddens.dtype), logits, entropy, loss


def eager_balance(probs: Tensor, row_mask: Tensor | None = None) -> Tensor:
    experts = probs.shape[-1]
    top = F.one_hot(probs.argmax(-1), experts).float()
    if row_mask is None:
        return experts * (top.mean(0) * probs.float().mean(0)).sum()
    counted = row_mask[:, None].float()
    rows = counted.sum().clamp(min=1)
    return experts * ((top * counted).sum(0) / rows * ((probs * counted).sum(0) / rows)).sum()


def make_rows(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return draw(generator, torch.float32, shape["B"], shape["K"], scale=2.0)


def make_softmax(*arguments: Any) -> dict[str, Any]:
    dtype = arguments[2]
    return {"logits": make_rows(*arguments).to(dtype), "temperature": 0.7, "clamp": 10.0}


def make_probs(*arguments: Any) -> dict[str, Any]:
    dtype = arguments[2]
    return {"probs": make_rows(*arguments).softmax(-1).to(dtype)}


def work_softmax(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    size = shape["B"] * shape["K"]
    e = dtype.itemsize
    return Work(Cost(size * e, size * e, 5 * size), Cost(2 * size * e, size * e, 9 * size))


def work_entropy(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    rows, size = shape["B"], shape["B"] * shape["K"]
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    return Work(Cost(size * e, rows * f, 3 * size), Cost(size * e + rows * f, size * e, 4 * size))


def work_balance(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    size, experts = shape["B"] * shape["K"], shape["K"]
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    return Work(Cost(size * e, f, 2 * size), Cost(experts * f + f, size * e, size), saved=experts * f)


def eager_softmax(logits: Tensor, temperature: float, clamp: float) -> Tensor:
    return (logits.clamp(-clamp, clamp) / temperature).softmax(-1)


def eager_entropy(probs: Tensor) -> Tensor:
    p = probs.float() if probs.dtype != torch.float64 else probs
    return -(p * (p + EPS).log()).sum(-1)


_ROWS = {
    "tiny": {"B": 4, "K": 5},
    "odd": {"B": 3, "K": 67},
    "one": {"B": 1, "K": 1},
    "empty": {"B": 0, "K": 4},
    "small": {"B": 64, "K": 8},
    "medium": {"B": 4096, "K": 64},
    "large": {"B": 65536, "K": 256},
}
_ROWS_ODD = ("odd", "one", "empty")

SPECS = (
    OpSpec(
        name="route_experts",
        column="routing",
        shapes={
            "tiny": {"B": 4, "S": 5, "D": 32, "K": 4},
            "odd": {"B": 3, "S": 7, "D": 37, "K": 3},
            "long": {"B": 2, "S": 70, "D": 37, "K": 3},
            "one": {"B": 1, "S": 1, "D": 1, "K": 1},
            "experts": {"B": 3, "S": 2, "D": 33, "K": 256},
            "empty": {"B": 0, "S": 4, "D": 8, "K": 3},
            "small": {"B": 8, "S": 16, "D": 768, "K": 4},
            "medium": {"B": 256, "S": 64, "D": 1024, "K": 8},
            "large": {"B": 4096, "S": 128, "D": 1024, "K": 8},
            "large-cpu": {"B": 256, "S": 128, "D": 1024, "K": 8},
            "token": {"B": 16384, "S": 1, "D": 4096, "K": 256},
        },
        odd=("odd", "long", "one", "experts", "empty"),
        variants={
            "mean": {},
            "max": {"pooling": "max"},
            "attention": {"pooling": "attention"},
            "masked": {"masks": True},
            "masked-attention": {"pooling": "attention", "masks": True},
        },
        make=make_route,
        work=work_route,
        eager=eager_route,
        headline=True,
        targets=(
            Target("small", "fwd", "eager", 4.0),
            Target("small", "fwd+bwd", "eager", 3.0),
            Target("small", "fwd", "compile", 1.0),
            Target("small", "fwd+bwd", "compile", 1.0),
            Target("large-cpu", "fwd", "read", 0.8),
            Target("large-cpu", "fwd", "compile", 1.0),
            Target("large-cpu", "fwd+bwd", "eager", 1.0),
            Target("large-cpu", "fwd+bwd", "compile", 1.0),
            Target("large", "fwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
            Target("large", "bwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
            Target("medium", "fwd", "copy", 0.7, device="cuda", dtype="bfloat16"),
            Target("small", "fwd+bwd", "eager", 10.0, device="cuda", dtype="bfloat16"),
            Target("small", "fwd+bwd", "compile", 2.0, device="cuda", dtype="bfloat16"),
        ),
    ),
    OpSpec(
        name="temperature_softmax",
        column="routing",
        shapes=_ROWS,
        odd=_ROWS_ODD,
        make=make_softmax,
        work=work_softmax,
        eager=eager_softmax,
    ),
    OpSpec(
        name="routing_entropy",
        column="routing",
        shapes=_ROWS,
        odd=_ROWS_ODD,
        make=make_probs,
        work=work_entropy,
        eager=eager_entropy,
    ),
    OpSpec(
        name="load_balance_loss",
        column="routing",
        shapes=_ROWS,
        odd=_ROWS_ODD,
        make=make_probs,
        work=work_balance,
        eager=eager_balance,
    ),
)
