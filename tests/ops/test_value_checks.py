"""Value checks follow the environment as it is at the call."""

from __future__ import annotations

import pytest
import torch

from memkern.ops import read_memory, retrieved_attention, scatter_slots, temperature_softmax


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, wrong = torch.randn(2, 3), torch.tensor(-1.0)
    temperature_softmax(logits, wrong)
    monkeypatch.setenv("MEMKERN_CHECK", "1")
    with pytest.raises(ValueError, match="temperature"):
        temperature_softmax(logits, wrong)
    with pytest.raises(ValueError, match=r"weights: expected values in \[0, 1.01\], got -1.0 at index \(0, 0, 1\)"):
        read_memory(torch.rand(1, 2, 3), torch.tensor([[[1.0, -1.0]]]))
    monkeypatch.setenv("MEMKERN_CHECK", "0")
    temperature_softmax(logits, wrong)


def test_what_takes_no_part_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKERN_CHECK", "1")
    queries, bank = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 6, 4)
    queries[0, 0, 0], bank[0, 0, 4:] = torch.nan, torch.nan
    indices = torch.tensor([[-1, 9], [5, 1], [0, -1]])[None, None]
    mask = torch.tensor([[True, True], [False, True], [True, True]])[None, None]
    retrieved_attention(queries, bank, bank, indices=indices, mask=mask)
    with pytest.raises(ValueError, match=r"keys: .* at index \(0, 0, 5, 0\)"):
        retrieved_attention(queries, bank, bank, indices=indices)
    pairs = torch.randn(1, 1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"queries: .* at index \(0, 0, 0, 0\)"):
        retrieved_attention(queries, pairs, pairs)
    slots = torch.tensor([[[1.0], [torch.nan]]])
    sequence, ids = torch.zeros(1, 3, 1), torch.tensor([[1, 1, 2]])
    scatter_slots(sequence, slots, ids, torch.tensor([1, 9]))
    with pytest.raises(ValueError, match=r"slots: .* at index \(0, 1, 0\)"):
        scatter_slots(sequence, slots, ids, torch.tensor([1, 2]))
