"""Gated expert updates, their weighted sum, and slots of a token sequence, in pure PyTorch: what kernels compute.

The update is a convex mix per element, ``M' = a u + (1 - a) M`` with ``a = p sigmoid([M;h] Wg^T + bg)`` and
``u = tanh([M;h] Wu^T + bu)``: the gated memory of a token model, scaled by the probability of its expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkern.reference._common import compute_dtype, full_precision


def update_experts(
    states: Tensor,
    hiddens: Tensor,
    probs: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    update_weight: Tensor,
    update_bias: Tensor | None,
    *,
    row_mask: Tensor | None = None,
    save: str = "activations",
) -> Tensor:
    """(B, K, S, D) -> (B, K, S, D); arguments as :func:`memkern.ops.expert_update.update_experts`.

    ``save`` changes nothing here: autograd keeps what it needs.
    """
    with full_precision(states):
        dtype = compute_dtype(states)
        m, h, p = states.to(dtype), hiddens.to(dtype), probs.to(dtype)
        if row_mask is not None:
            rows = row_mask[:, None]
            m = torch.where(rows[..., None, None], m, 0.0)
            h, p = torch.where(rows[..., None], h, 0.0), torch.where(rows, p, 0.0)
        g = torch.sigmoid(_preactivation(m, h, gate_weight, gate_bias))
        u = torch.tanh(_preactivation(m, h, update_weight, update_bias))
        p = p[..., None, None]
        a = p * g
        mixed = a * u + (1.0 - a) * m
        # p = 0 keeps the state bit for bit, -0 and a NaN beside it included, and still has a gradient: a zero whose
        # gradient is that of the mix, taken from the exact value.
        kept = m.detach() - torch.nan_to_num(mixed.detach() - mixed, nan=0.0)
        updated = torch.where(p == 0, kept, mixed).to(states.dtype)
        return updated if row_mask is None else torch.where(row_mask[:, None, None, None], updated, states)


def _preactivation(m: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[M;h] W^T + b for every expert, without the concatenation: (B, K, S, D)."""
    width = m.shape[-1]
    w = weight.to(m.dtype)
    z = m @ w[:, :, :width].transpose(1, 2) + h[:, None] @ w[:, :, width:].transpose(1, 2)
    return z if bias is None else z + bias.to(m.dtype)[:, None]


def aggregate_experts(states: Tensor, probs: Tensor) -> Tensor:
    """(B, K, S, D), (B, K) -> (B, S, D): sum_k p_k M_k in the dtype of ``states``."""
    dtype = compute_dtype(states)
    return (probs.to(dtype)[..., None, None] * states.to(dtype)).sum(1).to(states.dtype)


def gather_slots(hiddens: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    """(B, T, D), (B, T), (S,) -> (B, S, D): mean of the rows whose id is the slot's, zero where there is none."""
    h = hiddens.to(compute_dtype(hiddens))
    match = input_ids[:, None] == slot_ids[:, None]
    count = match.sum(2).clamp(min=1).to(h.dtype)
    # Slot by slot and not by a product with the matches: a NaN reaches the slots of its own id alone.
    sums = [torch.where(match[:, slot, :, None], h, 0.0).sum(1) for slot in range(slot_ids.shape[0])]
    if not sums:
        return hiddens.sum(1, keepdim=True)[:, :0]
    return (torch.stack(sums, 1) / count[..., None]).to(hiddens.dtype)


def gather_slots_gradient(grad: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    """Gradient of :func:`gather_slots` to ``hiddens``, itself differentiable in ``grad`` (B, S, D) -> (B, T, D)."""
    dtype = compute_dtype(grad)
    match = input_ids[:, None] == slot_ids[:, None]
    share = match.to(dtype) / match.sum(2, keepdim=True).clamp(min=1)
    with full_precision(grad):
        return (share.transpose(1, 2) @ grad.to(dtype)).to(grad.dtype)


def first_slots(input_ids: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, whether its id is a slot's and the first slot with that id: (B, T) bool, (B, T) int64."""
    match = input_ids[..., None] == slot_ids
    return match.any(-1), match.to(torch.uint8).argmax(-1)


def scatter_slots(sequence: Tensor, slots: Tensor, input_ids: Tensor, slot_ids: Tensor) -> Tensor:
    """(B, T, D) whose rows with a slot's id are that slot of (B, S, D); of equal ids the first counts."""
    if slot_ids.shape[0] == 0:
        # No slot, no value; the sum of none gives ``slots`` its gradient of zero.
        return torch.where(sequence.new_zeros((), dtype=torch.bool), slots.sum().to(sequence.dtype), sequence)
    hit, slot = first_slots(input_ids, slot_ids)
    # Gathered in full precision, so that a slot which stands at many positions sums their gradients there.
    s = slots.to(compute_dtype(sequence))
    rows = s.gather(1, slot[..., None].expand(-1, -1, s.shape[2]))
    return torch.where(hit[..., None], rows.to(sequence.dtype), sequence)


def scatter_slots_gradient(grad: Tensor, input_ids: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`scatter_slots` to ``sequence`` and, unrounded, ``slots``; differentiable in ``grad``."""
    dtype = compute_dtype(grad)
    batch, _, width = grad.shape
    count = slot_ids.shape[0]
    if count == 0:
        return grad.clone(), grad.new_zeros((batch, count, width), dtype=dtype)
    hit, slot = first_slots(input_ids, slot_ids)
    taken = hit[:, None] & (slot[:, None] == torch.arange(count, device=grad.device)[:, None])
    with full_precision(grad):
        d_slots = taken.to(dtype) @ torch.where(hit[..., None], grad.to(dtype), 0.0)
    return torch.where(hit[..., None], 0.0, grad), d_slots
