"""Where memory tokens stand in a segment, and what they carry into the encoder and out of it.

Behind the text, through the input embeddings: [T tokens as given | n read | m write]. Or where the inputs themselves
carry the ids of memory tokens. Both give the encoder the same embeddings, mask and segment ids at the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memkern.ops.expert_update import gather_slots, scatter_slots

MEMORY_SEGMENT = 4
"""Segment id of memory tokens; XLNet's own are 0, 1, 2 (CLS) and 3 (padding)."""


@dataclass
class Segment:
    """One segment as the caller gave it."""

    embeddings: Tensor
    """(B, T, D)."""
    attention_mask: Tensor | None
    """(B, T), 1 for tokens that take part."""
    token_type_ids: Tensor | None
    """(B, T) int64."""
    input_ids: Tensor | None
    """(B, T) int64, where there are ids."""
    read_ids: Tensor | None = None
    """(n,) int64: the inputs carry their read tokens themselves."""
    write_ids: Tensor | None = None
    """(m,) int64, with ``read_ids``."""

    @property
    def in_text(self) -> bool:
        """Whether the inputs carry the memory tokens."""
        return self.read_ids is not None or self.write_ids is not None

    def memory_positions(self) -> Tensor | None:
        """(B, T) bool, True at memory tokens among the inputs; None where there are none."""
        if not self.in_text:
            return None
        assert self.input_ids is not None
        found = torch.zeros_like(self.input_ids, dtype=torch.bool)
        for ids in (self.read_ids, self.write_ids):
            if ids is not None:
                found = found | torch.isin(self.input_ids, ids)
        return found

    def text_mask(self) -> Tensor:
        """(B, T) bool: unmasked tokens of the text itself."""
        if self.attention_mask is None:
            mask = torch.ones(self.embeddings.shape[:2], dtype=torch.bool, device=self.embeddings.device)
        else:
            mask = self.attention_mask > 0
        memory = self.memory_positions()
        return mask if memory is None else mask & ~memory


@dataclass
class EncoderInputs:
    """What the encoder sees."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor


def place(segment: Segment, read: Tensor, write: Tensor | None, backend: str | None) -> EncoderInputs:
    """Add the read tokens (B, n, D) and the write tokens (m, D) to a segment.

    Write tokens that the inputs carry and that this memory has no use for (``write`` is None) are masked, so that they
    change nothing.
    """
    batch, length, _ = segment.embeddings.shape
    embeddings = segment.embeddings
    dtype, device = embeddings.dtype, embeddings.device
    types = segment.token_type_ids
    if types is None:
        types = torch.zeros(batch, length, dtype=torch.long, device=device)
    mask = segment.attention_mask
    write_rows = None if write is None else write.to(dtype).expand(batch, -1, -1)
    if not segment.in_text:
        parts = [read.to(dtype)] if write_rows is None else [read.to(dtype), write_rows]
        extra = sum(part.shape[1] for part in parts)
        types = torch.cat([types, types.new_full((batch, extra), MEMORY_SEGMENT)], 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, extra)], 1)
        return EncoderInputs(torch.cat([embeddings, *parts], 1), mask, types)
    ids = segment.input_ids
    assert ids is not None
    memory = segment.memory_positions()
    assert memory is not None
    if segment.read_ids is not None:
        embeddings = scatter_slots(embeddings, read.to(dtype), ids, segment.read_ids, backend=backend)
    on = memory
    if segment.write_ids is not None:
        if write_rows is None:
            on = memory & ~torch.isin(ids, segment.write_ids)
            mask = torch.ones(batch, length, dtype=dtype, device=device) if mask is None else mask
        else:
            embeddings = scatter_slots(embeddings, write_rows.contiguous(), ids, segment.write_ids, backend=backend)
    if mask is not None:
        mask = torch.where(memory, on.to(mask.dtype), mask)
    return EncoderInputs(embeddings, mask, types.masked_fill(memory, MEMORY_SEGMENT))


def text_states(segment: Segment, hiddens: Tensor) -> Tensor:
    """(B, T, D): the states of the tokens as given, memory tokens among them where the inputs carry those."""
    return hiddens[:, : segment.embeddings.shape[1]]


def write_states(segment: Segment, hiddens: Tensor, count: int, backend: str | None) -> Tensor:
    """(B, m, D): the states at the write tokens; of a token that is absent zero, of one that repeats the mean."""
    if not segment.in_text:
        return hiddens[:, hiddens.shape[1] - count :]
    if segment.write_ids is None:
        return hiddens.new_zeros(hiddens.shape[0], count, hiddens.shape[2])
    assert segment.input_ids is not None
    return gather_slots(hiddens, segment.input_ids, segment.write_ids, backend=backend)


def slot_ids(name: str, ids: object, count: int, device: torch.device) -> Tensor:
    """``ids`` as (count,) int64.

    Raises:
        ValueError: another number of ids, or equal ones.
    """
    given = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))  # type: ignore[call-overload]
    if given.dim() != 1 or given.shape[0] != count:
        raise ValueError(f"{name}: expected {count} ids, one per memory token, got {tuple(given.shape)}")
    return given.to(device=device, dtype=torch.long)


def check_present(name: str, input_ids: Tensor, ids: Tensor, rows: Tensor | None) -> None:
    """Every id stands in every row that counts; this reads values, and so is for the strict mode alone.

    Raises:
        ValueError: an id is absent; the message names it and the row.
    """
    absent = ~(input_ids[:, :, None] == ids).any(1)
    if rows is not None:
        absent = absent & rows[:, None]
    if bool(absent.any()):
        row, index = (int(i) for i in absent.nonzero()[0])
        raise ValueError(
            f"{name}: strict_memory_tokens is on, and memory token {int(ids[index])} is absent from row {row} of "
            "input_ids"
        )
