"""Modules that know how their parameters are drawn.

``draw(init)`` takes a module of initialisers such as ``torch.nn.init``. Models pass transformers' own, which leave
alone what a checkpoint has loaded. transformers asks modules that hold parameters themselves, so the knowledge sits
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class XavierLinear(nn.Linear):
    """A Linear whose outputs start at the size of its inputs, whatever a model's ``initializer_range``."""

    def reset_parameters(self) -> None:
        self.draw(nn.init)

    def draw(self, init: Any) -> None:
        """Xavier weights, no bias."""
        init.xavier_uniform_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A Linear that starts at zero: what it feeds does not change at first."""

    def reset_parameters(self) -> None:
        self.draw(nn.init)

    def draw(self, init: Any) -> None:
        """Zeros."""
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class KeepLinear(nn.Linear):
    """The pre-activation of a gate that starts rather shut, so that a fresh memory keeps most of what it holds.

    A gate that starts half open halves what is stored at every step, and what a memory loses it cannot learn to use:
    the forget bias of LSTMs (Gers et al. 2000; Jozefowicz et al. 2015), seen from the input.
    """

    KEEP_BIAS = -1.0

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.draw(nn.init)

    def draw(self, init: Any) -> None:
        """The bias alone; the weights are drawn as those of any Linear."""
        init.constant_(self.bias, self.KEEP_BIAS)


class ExpertList(nn.ParameterList):
    """k parameters (S, D), each drawn by its own strategy."""

    def __init__(self, strategies: Sequence[str], slots: int, width: int) -> None:
        super().__init__(nn.Parameter(torch.empty(slots, width)) for _ in strategies)
        self.strategies = list(strategies)
        self.draw(nn.init)

    def draw(self, init: Any) -> None:
        """Every parameter by its strategy."""
        for strategy, parameter in zip(self.strategies, self, strict=True):
            if strategy == "learned":
                init.normal_(parameter, mean=0.0, std=0.02)
            elif strategy == "zeros":
                init.zeros_(parameter)
            elif strategy == "uniform":
                init.uniform_(parameter, a=0.0, b=0.1)
            else:
                init.orthogonal_(parameter)
