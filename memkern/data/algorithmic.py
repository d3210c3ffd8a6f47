"""The tasks of the Neural Turing Machine that need a memory: copy, and associative recall.

Each batch is a pair of inputs and targets with a mask of the steps that count; bits are drawn anew every time, so that
nothing but an algorithm can be learned.

Source: Graves, Wayne, Danihelka, "Neural Turing Machines" (2014), sections 4.1 and 4.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """A batch of one task."""

    inputs: Tensor
    """(B, T, bits + 2): the bits, then two channels of flags."""
    targets: Tensor
    """(B, T, bits) in {0, 1}"""
    counts: Tensor
    """(B, T) bool: the steps whose target counts."""


def copy_task(batch: int, bits: int, longest: int, generator: torch.Generator | None = None) -> Sequences:
    """Show a sequence of random bits, then a flag; afterwards the sequence has to come out again, from its start.

    Args:
        batch: B.
        bits: size of an element.
        longest: each row's length is drawn from 1 to ``longest``; T is 2 longest + 1.
    """
    steps = 2 * longest + 1
    inputs, targets = torch.zeros(batch, steps, bits + 2), torch.zeros(batch, steps, bits)
    counts = torch.zeros(batch, steps, dtype=torch.bool)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator).tolist()
    for row, length in enumerate(lengths):
        shown = torch.randint(0, 2, (length, bits), generator=generator).float()
        inputs[row, :length, :bits] = shown
        inputs[row, :length, bits] = 1.0
        inputs[row, length, bits + 1] = 1.0
        targets[row, length + 1 : 2 * length + 1] = shown
        counts[row, length + 1 : 2 * length + 1] = True
    return Sequences(inputs, targets, counts)


def recall_task(batch: int, bits: int, most: int, generator: torch.Generator | None = None) -> Sequences:
    """Show pairs of a key and a value, then one of the keys again: its value has to come out at the next step.

    Args:
        batch: B.
        bits: size of a key and of a value; the keys of a row differ.
        most: each row has 2 to ``most`` <= 2^bits pairs; T is 2 most + 2.
    """
    steps = 2 * most + 2
    inputs, targets = torch.zeros(batch, steps, bits + 2), torch.zeros(batch, steps, bits)
    counts = torch.zeros(batch, steps, dtype=torch.bool)
    pairs = torch.randint(2, most + 1, (batch,), generator=generator).tolist()
    for row, count in enumerate(pairs):
        shown = torch.randint(0, 2, (2 * count, bits), generator=generator).float()
        shown[::2] = _different(count, bits, generator)
        asked = int(torch.randint(0, count, (1,), generator=generator))
        inputs[row, : 2 * count, :bits] = shown
        inputs[row, : 2 * count : 2, bits] = 1.0
        inputs[row, 2 * count, :bits] = shown[2 * asked]
        inputs[row, 2 * count, bits + 1] = 1.0
        targets[row, 2 * count + 1] = shown[2 * asked + 1]
        counts[row, 2 * count + 1] = True
    return Sequences(inputs, targets, counts)


def _different(count: int, bits: int, generator: torch.Generator | None) -> Tensor:
    """(count, bits): so many different patterns of bits."""
    numbers = torch.randperm(2**bits, generator=generator)[:count]
    return ((numbers[:, None] >> torch.arange(bits)) & 1).float()
