"""Value checks follow the environment as it is at the call."""

from __future__ import annotations

import pytest
import torch

from memkern.ops import temperature_softmax


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, wrong = torch.randn(2, 3), torch.tensor(-1.0)
    temperature_softmax(logits, wrong)
    monkeypatch.setenv("MEMKERN_CHECK", "1")
    with pytest.raises(ValueError, match="temperature"):
        temperature_softmax(logits, wrong)
    monkeypatch.setenv("MEMKERN_CHECK", "0")
    temperature_softmax(logits, wrong)
