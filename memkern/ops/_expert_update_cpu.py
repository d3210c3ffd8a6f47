"""``update_experts`` on the CPU: matrix products by MKL or oneDNN, everything between them fused in C++.

Products of (B, K, S, D) states are made expert by expert, on rows gathered into one reused (R, D) workspace, R = B S;
states and hiddens are never laid side by side: each meets its half of a weight in a product of its own. They run in
bfloat16 when states, hiddens and weights all are bfloat16, else in float32 (float64 for float64).

BLAS (MKL) in float32 and float64, and our own product (``configs/cpu_gemm.json``) in float32 and bfloat16, take a half
of a weight where it lies. d_hiddens grows expert by expert, in float32 also where operands are bfloat16.

oneDNN in bfloat16, where our own is not used, makes the hiddens' half for all experts in one product per weight, in the
tensors that are kept for backward if they have its dtype; the kernel adds both halves. d_hiddens is one product over
all experts: a sum in float32 that is rounded once, in a fixed order.

oneDNN in float32 needs contiguous weights and makes its own outputs: both halves of an expert's two weights are copied
to a workspace. It is used where it is faster by more than that costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memkern.ops._cpu_gemm import by_onednn, multiply, onednn_linear, own_product
from memkern.ops._library import accumulator

# Rows that go through forward at once: enough for full speed, few enough that what a product writes is in the cache
# when it is read, and that a fresh buffer stays below 32 MiB, where the allocator would hand out untouched pages.
BLOCK_ELEMENTS = 1 << 21
# As many of bfloat16, whose products are float32 (Zen 4, shares of the bare products' speed for 2048 rows: 0.91 by 512,
# 0.85 all at once).
LOW_ROWS = 512
# From here on the allocator may hand out untouched pages.
RECYCLED_BYTES = 1 << 22


def _row(x: Tensor) -> Tensor:
    """``x`` with stride 1 along the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _product_dtype(states: Tensor, hiddens: Tensor, gate_weight: Tensor, update_weight: Tensor) -> torch.dtype:
    if states.dtype == torch.float64:
        return torch.float64
    low = all(t.dtype == torch.bfloat16 for t in (states, hiddens, gate_weight, update_weight))
    return torch.bfloat16 if low else torch.float32


def saved_dtype(states: Tensor, *others: Tensor) -> torch.dtype:
    """Of the gates and updates kept for backward: low precision only where every gradient made from them is low too."""
    same = all(t.dtype == states.dtype for t in others)
    return states.dtype if same else accumulator(states)


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()


def _hiddens_rows(hiddens: Tensor, dtype: torch.dtype, row_mask: Tensor | None) -> Tensor:
    """(R, D) in ``dtype``; with a mask, zero in the rows that it excludes, so that no NaN there meets a zero."""
    x = hiddens.to(dtype)
    if row_mask is not None:
        x = torch.where(row_mask[:, None, None], x, 0.0)
    return x.reshape(-1, hiddens.shape[2])


def update_experts_fwd(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, experts, slots, width = states.shape
    out = states.new_empty(states.shape)
    kept = (batch, slots, experts, width) if save else (0,)
    low = saved_dtype(states, hiddens, gate_weight, update_weight)
    gates, updates = (_empty(states, kept, low) for _ in range(2))
    if out.numel() == 0:
        return out, gates, updates
    dtype, f = _product_dtype(states, hiddens, gate_weight, update_weight), accumulator(states)
    states, x = _row(states), hiddens.to(dtype).reshape(batch * slots, width)
    p, mask = probs.to(f).contiguous(), None if row_mask is None else row_mask.contiguous()
    biases = _bias(gate_bias, f), _bias(update_bias, f)
    saved = (gates, updates) if save else (None, None)
    onednn, ours = by_onednn(x, batch * slots), own_product(x, batch * slots)
    # A block holds whole batch items.
    step = max(1, (LOW_ROWS * width if ours and dtype == torch.bfloat16 else BLOCK_ELEMENTS) // (slots * width))
    weights = tuple(w.to(dtype).contiguous() for w in (gate_weight, update_weight))
    rows = min(step, batch) * slots
    gathered = x.new_empty((rows, width))
    mix = torch.ops.memkern.expert_mix_forward

    def states_of(first: int, last: int, expert: int) -> Tensor:
        into = gathered[: (last - first) * slots]
        into.view(last - first, slots, width).copy_(states[first:last, expert])
        return into

    if not onednn and (ours or dtype != torch.bfloat16):
        products = x.new_empty((2, rows, width), dtype=f)
        for first in range(0, batch, step):
            last = min(batch, first + step)
            sums, part = products[:, : (last - first) * slots], x[first * slots : last * slots]
            for expert in range(experts):
                own = states_of(first, last, expert)
                for product, weight in zip(sums, weights, strict=True):
                    multiply(product, own, weight[expert, :, :width].t(), ours)
                    multiply(product, part, weight[expert, :, width:].t(), ours, add=True)
                mix(out, *sums.unsqueeze(2), None, None, states, p, *biases, mask, *saved, first, expert)
        return out, gates, updates
    if onednn:
        own, others = (x.new_empty((2, width, width)) for _ in range(2))
        for expert in range(experts):
            for half, weight in enumerate(weights):
                own[half].copy_(weight[expert, :, :width])
                others[half].copy_(weight[expert, :, width:])
            for first in range(0, batch, step):
                last = min(batch, first + step)
                h = onednn_linear(x[first * slots : last * slots], others.view(2 * width, width))
                m = onednn_linear(states_of(first, last, expert), own.view(2 * width, width))
                halves = (h[:, None, :width], h[:, None, width:], m[:, None, :width], m[:, None, width:])
                mix(out, *halves, states, p, *biases, mask, *saved, first, expert)
        return out, gates, updates
    in_place = save and gates.dtype == dtype
    made = [x.new_empty((rows, experts, width)) for _ in range(0 if in_place else 2)]
    own = x.new_empty((2, rows, width))
    for first in range(0, batch, step):
        last = min(batch, first + step)
        begin, end = first * slots, last * slots
        if in_place:
            both = [t.view(-1, experts, width)[begin:end] for t in (gates, updates)]
        else:
            both = [t[: end - begin] for t in made]
        for product, weight in zip(both, weights, strict=True):
            from_hiddens = weight.view(experts * width, 2 * width)[:, width:]
            torch.mm(x[begin:end], from_hiddens.t(), out=product.view(end - begin, experts * width))
        for expert in range(experts):
            gathered_rows = states_of(first, last, expert)
            for product, weight in zip(own, weights, strict=True):
                torch.mm(gathered_rows, weight[expert, :, :width].t(), out=product[: end - begin])
            halves = (*(t[:, expert, None] for t in both), *own[:, : end - begin, None])
            mix(out, *halves, states, p, *biases, mask, *saved, first, expert)
    return out, gates, updates


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous tensor; a large one from the memory of those that training has dropped."""
    made = like.new_empty((0,), dtype=dtype or like.dtype)
    size = math.prod(shape) * made.itemsize
    if made.dtype == torch.float64 or size < RECYCLED_BYTES:
        return made.resize_(shape)
    kept: Tensor = torch.ops.memkern.empty_recycled([-(-size // 4)])
    return made.set_(kept.untyped_storage(), 0, torch.Size(shape))  # type: ignore[call-overload, no-any-return]


def _backward_by_expert(
    dtype: torch.dtype,
    grad: Tensor,
    states: Tensor,
    x: Tensor | None,
    probs: Tensor,
    gates: Tensor,
    updates: Tensor,
    mask: Tensor | None,
    weights: list[Tensor],
    d_states: Tensor | None,
    d_probs: Tensor | None,
    d_weights: list[Tensor],
    d_biases: list[Tensor],
    need_hiddens: bool,
) -> Tensor:
    """Fill what is given of the gradients; the result is d_hiddens (R, D).

    Args:
        x: rows of the hiddens, with which ``d_weights`` and ``d_biases`` are filled, or None.
    """
    batch, experts, slots, width = states.shape
    rows, sums = batch * slots, accumulator(states)
    # One expert at a time: what its gates send back is in the cache when the products read it.
    d = states.new_empty((2, rows, width), dtype=dtype)
    d_products = d.transpose(0, 1).unsqueeze(1)
    own = own_product(d, rows)
    d_hiddens = d.new_zeros((rows if need_hiddens else 0, width), dtype=sums)
    to_states = d.new_empty((rows if d_states is not None else 0, width), dtype=sums)
    # BLAS takes the columns of the weights that are asked for at once: those of the states, of the hiddens, or both.
    columns = slice(0 if d_states is not None else width, 2 * width if need_hiddens else width)
    through = d.new_empty((0 if own else rows, 2 * width))
    gathered = d.new_empty((rows if x is not None else 0, width))
    exact = [w if w.dtype == d.dtype else w.new_empty(w.shape, dtype=d.dtype) for w in d_weights]
    for expert in range(experts):
        torch.ops.memkern.expert_mix_backward(
            d_products,
            d_probs,
            *(d_biases if x is not None else (None, None)),
            grad, states, probs, gates, updates, mask, expert,
        )  # fmt: skip
        if own:
            for half, weight in enumerate(weights):
                if d_states is not None:
                    multiply(to_states, d[half], weight[expert, :, :width], own, add=half > 0)
                if need_hiddens:
                    multiply(d_hiddens, d[half], weight[expert, :, width:], own, add=True)
        elif d_states is not None or need_hiddens:
            for half, weight in enumerate(weights):
                multiply(through[:, columns], d[half], weight[expert][:, columns], own, add=half > 0)
            if d_states is not None:
                to_states.copy_(through[:, :width])
            if need_hiddens:
                d_hiddens += through[:, width:]
        if d_states is not None:
            torch.ops.memkern.expert_mix_states(d_states, grad, probs, gates, to_states, mask, expert)
        if x is not None:
            into = gathered.view(batch, slots, width)
            into.copy_(states[:, expert])
            if mask is not None:
                into.masked_fill_(~mask[:, None, None], 0.0)
            for half, d_weight in enumerate(exact):
                multiply(d_weight[expert, :, :width], d[half].t(), gathered, own)
                multiply(d_weight[expert, :, width:], d[half].t(), x, own)
    if x is not None:
        for d_weight, precise in zip(d_weights, exact, strict=True):
            if d_weight is not precise:
                d_weight.copy_(precise)
    return d_hiddens


def update_experts_bwd(
    grad: Tensor,
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    row_mask: Tensor | None,
    gates: Tensor,
    updates: Tensor,
    need_states: bool,
    need_hiddens: bool,
    need_probs: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    batch, experts, slots, width = states.shape
    dtype, f = _product_dtype(states, hiddens, gate_weight, update_weight), accumulator(states)
    d_states = states.new_empty(states.shape if need_states else (0,))
    d_probs = probs.new_empty(probs.shape if need_probs else (0,), dtype=f)
    d_biases = [w.new_empty((experts, width) if need_params else (0,), dtype=f) for w in (gate_weight, update_weight)]
    d_weights = [_empty(w, w.shape if need_params else (0,)) for w in (gate_weight, update_weight)]
    if states.numel() == 0:
        for made in (d_probs, *d_biases, *d_weights):
            made.zero_()
        d_hiddens = hiddens.new_zeros(hiddens.shape if need_hiddens else (0,))
        return d_states, d_hiddens, d_probs, d_weights[0], d_biases[0], d_weights[1], d_biases[1]
    if gates.numel() == 0:
        inputs = (states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias, row_mask)
        _, gates, updates = update_experts_fwd(*inputs, True)
    grad, states = _row(grad), _row(states)
    p, mask = probs.to(f).contiguous(), None if row_mask is None else row_mask.contiguous()
    rows = batch * slots
    onednn = by_onednn(torch.empty(0, dtype=dtype), rows)
    if not onednn and (dtype != torch.bfloat16 or own_product(torch.empty(0, dtype=dtype), rows)):
        found = _backward_by_expert(
            dtype,
            grad,
            states,
            _hiddens_rows(hiddens, dtype, row_mask) if need_params else None,
            p,
            gates,
            updates,
            mask,
            [w.to(dtype).contiguous() for w in (gate_weight, update_weight)],
            d_states if need_states else None,
            d_probs if need_probs else None,
            d_weights,
            d_biases,
            need_hiddens,
        )
        d_hiddens = found.view(hiddens.shape).to(hiddens.dtype) if need_hiddens else hiddens.new_empty((0,))
        return d_states, d_hiddens, d_probs, d_weights[0], d_biases[0], d_weights[1], d_biases[1]
    d_products = _empty(states, (rows, experts, 2, width), dtype)
    torch.ops.memkern.expert_mix_backward(
        d_products,
        d_probs if need_probs else None,
        *(d_biases if need_params else (None, None)),
        grad, states, p, gates, updates, mask, 0,
    )  # fmt: skip

    def through(d: Tensor, weight: Tensor) -> Tensor:
        """(n, k) @ (k, m) with a contiguous ``weight``."""
        return onednn_linear(d, weight.t()) if onednn else torch.mm(d, weight)

    halves = torch.empty((2, width, width), dtype=dtype)
    if need_states:
        for expert in range(experts):
            for half, weight in enumerate((gate_weight, update_weight)):
                halves[half].copy_(weight[expert, :, :width])
            d = through(d_products[:, expert].view(rows, 2 * width), halves.view(2 * width, width))
            torch.ops.memkern.expert_mix_states(d_states, grad, p, gates, d, mask, expert)
    d_hiddens = hiddens.new_empty((0,))
    if need_hiddens:
        stacked = _empty(states, (experts, 2, width, width), dtype)
        for half, weight in enumerate((gate_weight, update_weight)):
            stacked[:, half].copy_(weight[:, :, width:])
        d = through(d_products.view(rows, -1), stacked.view(-1, width))
        d_hiddens = d.view(hiddens.shape).to(hiddens.dtype)
    if need_params:
        x = _hiddens_rows(hiddens, dtype, row_mask)
        gathered = x.new_empty((rows, width))
        exact = [d if d.dtype == dtype else d.new_empty(d.shape, dtype=dtype) for d in d_weights]
        for expert in range(experts):
            gathered.view(batch, slots, width).copy_(states[:, expert])
            if mask is not None:
                gathered.view(batch, slots, width).masked_fill_(~mask[:, None, None], 0.0)
            for half, d_weight in enumerate(exact):
                d = d_products[:, expert, half].t()
                torch.mm(d, gathered, out=d_weight[expert, :, :width])
                torch.mm(d, x, out=d_weight[expert, :, width:])
        for d_weight, precise in zip(d_weights, exact, strict=True):
            if d_weight is not precise:
                d_weight.copy_(precise)
    return d_states, d_hiddens, d_probs, d_weights[0], d_biases[0], d_weights[1], d_biases[1]
