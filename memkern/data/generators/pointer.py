"""The cross-segment pointer: a needle names a value; the last segment lists all values, and the right one is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from memkern.data.generators.segmented import CLS, NEEDLE, PAD, QUERY, SEP, SPECIALS, SegmentedQuestions

FILLERS = 16


def pointer_vocabulary(values: int = 8) -> int:
    """How many token ids :func:`cross_segment_pointer` draws from."""
    return len(SPECIALS) + values + FILLERS


def cross_segment_pointer(
    count: int,
    segments: int,
    *,
    distance: int | Tensor | None = None,
    values: int = 8,
    segment_length: int = 18,
    seed: int = 0,
) -> SegmentedQuestions:
    """Documents with ``<needle> v`` in one segment and, in the last, ``<query>`` and all values in random order.

    The answer is the position of v in that list. Without what stood in an earlier segment every listed value is
    equally likely, so that a model without memory is at 1 / ``values`` for every distance above 0.

    Args:
        count: documents B.
        segments: segments T of each.
        distance: how many segments before the last the needle stands, an int or (B,) int64 in [0, T); None draws it
            uniformly.
        values: size of the list.
        segment_length: tokens L of a segment, at least ``values`` + 5.
        seed: everything is drawn from it.

    Returns:
        :class:`SegmentedQuestions`; token ids are below :func:`pointer_vocabulary`.

    Raises:
        ValueError: a size or distance out of range.
    """
    shortest = values + 5  # needle and its value, the query mark, <sep> and <cls>
    for name, given, least in (
        ("count", count, 0),
        ("segments", segments, 1),
        ("values", values, 2),
        ("segment_length", segment_length, shortest),
    ):
        if given < least:
            raise ValueError(f"{name}: expected at least {least}, got {given}")
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(segments, (count,), generator=draw)
    if distance is not None:
        drawn = torch.as_tensor(distance, dtype=torch.int64).expand(count).clone()
        if count and not (int(drawn.min()) >= 0 and int(drawn.max()) < segments):
            raise ValueError(f"distance: expected values in [0, {segments}), got {distance}")

    first_value, first_filler = len(SPECIALS), len(SPECIALS) + values
    ids = first_filler + torch.randint(FILLERS, (count, segments, segment_length), generator=draw)
    ids[..., -2], ids[..., -1] = SEP, CLS
    order = torch.rand(count, values, generator=draw).argsort(1)
    listed = segment_length - 2 - values
    ids[:, -1, listed - 1] = QUERY
    ids[:, -1, listed : listed + values] = first_value + order
    wanted = torch.randint(values, (count,), generator=draw)
    # The text of the last segment ends before the query mark; all needles stay there, so that places tell nothing.
    spot = torch.randint(listed - 2, (count,), generator=draw)
    rows = torch.arange(count)
    ids[rows, segments - 1 - drawn, spot] = NEEDLE
    ids[rows, segments - 1 - drawn, spot + 1] = first_value + wanted
    return SegmentedQuestions(
        input_ids=ids,
        attention_mask=(ids != PAD).to(torch.int64),
        segment_mask=torch.ones(count, segments, dtype=torch.bool),
        answer_position=listed + (order == wanted[:, None]).to(torch.int64).argmax(1),
        candidates=torch.arange(listed, listed + values).expand(count, values),
        distance=drawn,
    )
