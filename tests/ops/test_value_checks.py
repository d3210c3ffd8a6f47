"""Value checks follow the environment as it is at the call."""

from __future__ import annotations

import pytest
import torch

from memkern.ops import read_memory, temperature_softmax


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
