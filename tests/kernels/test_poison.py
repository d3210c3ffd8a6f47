"""Poisoned memory: every way to allocate without filling, and nothing left behind."""

from __future__ import annotations

import torch

from memkern.testing.poison import poisoned


def test_every_uninitialised_allocation_is_poisoned_and_only_inside() -> None:
    like = torch.ones(3)
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        made = [
            torch.empty(3),
            torch.empty_like(like),
            like.new_empty(3),
            torch.empty_strided((3,), (2,)),
            torch.empty(3, dtype=torch.bfloat16),
            torch.empty(3, dtype=torch.float64),
        ]
        integers = torch.empty(3, dtype=torch.int32)
        assert torch.equal(torch.zeros(3), like - 1)
    assert all(bool(tensor.isnan().all()) for tensor in made)
    assert integers.tolist() == [2**31 - 1] * 3
    assert torch.are_deterministic_algorithms_enabled() == before


def test_an_error_restores_the_settings() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with poisoned():
            raise KeyError
    except KeyError:
        pass
    assert torch.are_deterministic_algorithms_enabled() == before
