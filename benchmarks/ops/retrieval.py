"""Retrieval: inputs, least traffic and arithmetic, and what users write instead."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Case, Cost, Function, OpSpec, Options, Shape, Target, Unsuitable, Work, draw


def make_attention(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    batch, heads, count, pairs, width, bank = (shape[letter] for letter in "BATCDM")
    rows = (batch, heads, bank, width) if options.get("bank") else (batch, heads, count, pairs, width)
    made: dict[str, Any] = {
        "queries": draw(generator, dtype, batch, heads, count, width),
        "keys": draw(generator, dtype, *rows),
        "values": draw(generator, dtype, *rows),
    }
    if options.get("bank"):
        made["indices"] = torch.randint(0, bank, (batch, heads, count, pairs), generator=generator, device=device)
    if options.get("masks"):
        made["mask"] = torch.rand(batch, heads, count, pairs, generator=generator, device=device) > 0.3
    return made


def work_attention(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """Own pairs: each key and value once, backward each and its gradient once. Bank: each row that is retrieved once.

    Masked pairs need not be read; the count has the expected share of them.
    """
    batch, heads, count, pairs, width, bank = (shape[letter] for letter in "BATCDM")
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    queries = batch * heads * count
    used = 0.7 if options.get("masks") else 1.0
    entries = int(queries * pairs * used)
    lists = queries * pairs * (bool(options.get("masks")) + 8 * bool(options.get("bank")))
    rows = min(entries, batch * heads * bank) if options.get("bank") else entries
    written = batch * heads * bank if options.get("bank") else queries * pairs
    forward = Cost((2 * rows + queries) * width * e + lists, queries * width * e, 4 * entries * width)
    backward = Cost(
        (2 * rows + 2 * queries) * width * e + queries * f + lists,
        (2 * written + queries) * width * e,
        10 * entries * width,
    )
    return Work(forward, backward, queries * f)


def gathered(keys: Tensor, values: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (B, A, T, C, d) pairs that the operator never makes."""
    if indices is None:
        return keys, values
    batch, heads, count, pairs = indices.shape
    flat = indices.reshape(batch, heads, count * pairs, 1).expand(-1, -1, -1, keys.shape[-1])
    keys, values = (x.gather(2, flat).view(batch, heads, count, pairs, -1) for x in (keys, values))
    return keys, values


def eager_attention(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention over neighbours as memory-augmented transformers write it."""
    keys, values = gathered(keys, values, indices)
    scores = torch.einsum("batd,batcd->batc", queries, keys) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.einsum("batc,batcd->batd", scores.softmax(-1), values)


def sdpa(case: Case) -> Function:
    """torch's fused attention with one query a batch item."""
    if 0 in case.shape.values():
        raise Unsuitable("empty")

    def call(
        queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        keys, values = gathered(keys, values, indices)
        batch, heads, count, pairs, width = keys.shape
        rows = (batch * heads * count, 1)
        bias = None if mask is None else mask.reshape(*rows, 1, pairs)
        out = F.scaled_dot_product_attention(
            queries.reshape(*rows, 1, width),
            keys.reshape(*rows, pairs, width),
            values.reshape(*rows, pairs, width),
            attn_mask=bias,
        )
        return out.reshape(queries.shape)

    return call


def make_fuse(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    batch, count, width, sources = (shape[letter] for letter in "BTDN")
    made: list[Tensor | None] = [draw(generator, dtype, batch, count, width) for _ in range(sources)]
    if options.get("absent"):
        made.insert(1, None)
    return {"sources": made, "gate_logits": draw(generator, dtype, batch, count, len(made))}


def work_fuse(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    batch, count, width, sources = (shape[letter] for letter in "BTDN")
    size, e = batch * count * width, dtype.itemsize
    gates = batch * count * sources * e
    return Work(
        Cost(sources * size * e + gates, size * e, 2 * sources * size),
        Cost((sources + 1) * size * e + gates, sources * size * e + gates, 3 * sources * size),
    )


def eager_fuse(sources: list[Tensor | None], gate_logits: Tensor) -> Tensor:
    present = [i for i, source in enumerate(sources) if source is not None]
    gates = gate_logits[..., present].softmax(-1)
    terms = [gates[..., j, None] * sources[i] for j, i in enumerate(present)]  # type: ignore[operator]
    return torch.stack(terms).sum(0)


def make_spans(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    segments, tokens = shape["N"], shape["T"]

    def chance(share: float) -> Tensor:
        return torch.rand(segments, tokens, generator=generator, device=device) < share

    made: dict[str, Any] = {name: draw(generator, dtype, segments, tokens) for name in ("start_logits", "end_logits")}
    made |= {"start_positive": chance(0.05), "end_positive": chance(0.05), "valid": chance(0.9)}
    made["document"] = torch.arange(segments, device=device) // 4
    return made


def work_spans(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    size, segments = shape["N"] * shape["T"], shape["N"]
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    read = size * (2 * e + 3) + 8 * segments
    return Work(Cost(read, f, 6 * size), Cost(read + 4 * segments * f, 2 * size * e, 8 * size), 4 * segments * f)


def eager_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positive: Tensor,
    end_positive: Tensor,
    valid: Tensor,
    document: Tensor,
) -> Tensor:
    """Scatter of shifted exponentials to documents, as it is usually written."""
    segments = document.shape[0]
    total = start_logits.new_zeros(segments, dtype=torch.float32)
    counted = torch.ones(segments, dtype=torch.bool, device=document.device)
    for logits, positive in ((start_logits, start_positive), (end_logits, end_positive)):
        x = logits.float().masked_fill(~valid, -math.inf)
        top = x.amax()
        exponentials = (x - top).exp()
        zeros = total.new_zeros(segments)
        everything = zeros.index_add(0, document, exponentials.sum(1))
        right = zeros.index_add(0, document, (exponentials * positive).sum(1))
        counted = counted & (right > 0)
        total = total + torch.where(right > 0, everything, 1.0).log() - torch.where(right > 0, right, 1.0).log()
    return 0.5 * torch.where(counted, total, 0.0).sum() / counted.sum().clamp(min=1)


SPECS = (
    OpSpec(
        name="retrieved_attention",
        column="retrieval",
        shapes={
            "tiny": {"B": 2, "A": 2, "T": 3, "C": 4, "D": 16, "M": 9},
            "odd": {"B": 1, "A": 3, "T": 5, "C": 7, "D": 33, "M": 11},
            "one": {"B": 1, "A": 1, "T": 1, "C": 1, "D": 1, "M": 1},
            "many": {"B": 1, "A": 1, "T": 2, "C": 70, "D": 40, "M": 50},
            "empty": {"B": 0, "A": 2, "T": 3, "C": 4, "D": 8, "M": 5},
            "small": {"B": 1, "A": 12, "T": 128, "C": 32, "D": 64, "M": 2048},
            "medium": {"B": 8, "A": 12, "T": 512, "C": 32, "D": 64, "M": 8192},
            "large": {"B": 8, "A": 16, "T": 2048, "C": 64, "D": 64, "M": 16384},
            "large-cpu": {"B": 2, "A": 12, "T": 256, "C": 32, "D": 64, "M": 4096},
        },
        odd=("odd", "one", "many", "empty"),
        variants={
            "own": {},
            "bank": {"bank": True},
            "masked": {"masks": True},
            "masked-bank": {"bank": True, "masks": True},
        },
        make=make_attention,
        work=work_attention,
        eager=eager_attention,
        peers={"sdpa": sdpa},
        headline=True,
        targets=(
            Target("large-cpu", "fwd", "read", 0.75),
            Target("large-cpu", "fwd", "read", 0.75, dtype="bfloat16"),
            Target("large-cpu", "fwd", "eager", 2.0),
            Target("large-cpu", "fwd", "eager", 2.0, dtype="bfloat16"),
            Target("large-cpu", "fwd", "eager", 2.0, variant="bank"),
            Target("large-cpu", "fwd+bwd", "eager", 2.0, variant="bank"),
            Target("large-cpu", "fwd", "sdpa", 1.0),
            Target("large", "fwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
            Target("large", "bwd", "copy", 0.8, device="cuda", dtype="bfloat16"),
            Target("medium", "fwd+bwd", "eager", 3.0, device="cuda", dtype="bfloat16"),
            Target("medium", "fwd+bwd", "compile", 1.5, device="cuda", dtype="bfloat16"),
        ),
    ),
    OpSpec(
        name="fuse_sources",
        column="retrieval",
        shapes={
            "tiny": {"B": 2, "T": 3, "D": 16, "N": 3},
            "odd": {"B": 1, "T": 5, "D": 37, "N": 2},
            "one": {"B": 1, "T": 1, "D": 1, "N": 1},
            "many": {"B": 1, "T": 2, "D": 70, "N": 15},
            "empty": {"B": 0, "T": 4, "D": 8, "N": 2},
            "small": {"B": 8, "T": 16, "D": 768, "N": 2},
            "medium": {"B": 8, "T": 512, "D": 1024, "N": 3},
            "large": {"B": 16, "T": 1024, "D": 1024, "N": 3},
        },
        odd=("odd", "one", "many", "empty"),
        variants={"all": {}, "absent": {"absent": True}},
        make=make_fuse,
        work=work_fuse,
        eager=eager_fuse,
        targets=(
            Target("medium", "fwd", "eager", 2.0),
            Target("medium", "fwd+bwd", "eager", 2.0),
            Target("large", "fwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
            Target("large", "bwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
        ),
    ),
    OpSpec(
        name="span_loss",
        column="retrieval",
        shapes={
            "tiny": {"N": 6, "T": 16},
            "odd": {"N": 5, "T": 37},
            "one": {"N": 1, "T": 1},
            "empty": {"N": 0, "T": 4},
            "small": {"N": 8, "T": 384},
            "medium": {"N": 64, "T": 384},
            "large": {"N": 512, "T": 512},
        },
        odd=("odd", "one", "empty"),
        make=make_spans,
        work=work_spans,
        eager=eager_spans,
        targets=(Target("small", "fwd+bwd", "eager", 2.0),),
    ),
)
