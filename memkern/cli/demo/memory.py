"""A Differentiable Neural Computer learns to copy and to recall by association, in a minute or two on a CPU.

An LSTM reads the sequence and speaks to the memory through :class:`memkern.nn.MemoryController`; all its steps are one
:func:`memkern.ops.memory_scan`. The same model can take them one by one in plain PyTorch, which is what the scan is
timed against.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memkern.data import Sequences, copy_task, recall_task
from memkern.nn import MemoryController
from memkern.ops.memory import MemoryInterface, memory_scan
from memkern.reference import memory as reference

TASKS: dict[str, Callable[..., Sequences]] = {"copy": copy_task, "recall": recall_task}
SIZES = {"copy": 6, "recall": 4}  # longest sequence, most pairs


class SequenceMemory(nn.Module):
    """LSTM, memory and a linear layer over both.

    Args:
        bits: size of an element.
        slots, width, heads: of the memory.
        plain: take the memory's steps one by one in plain PyTorch, instead of one scan on the best backend.
    """

    def __init__(
        self, bits: int, *, hidden: int = 64, slots: int = 16, width: int = 16, heads: int = 1, plain: bool = False
    ) -> None:
        super().__init__()
        self.plain = plain
        self.lstm = nn.LSTM(bits + 2, hidden, batch_first=True)
        # The memory also sees the input itself: keys are then linear in what is shown.
        sizes = (hidden + bits + 2, slots, width, heads)
        self.controller = MemoryController(*sizes, use_temporal_links=True, use_output=False)
        self.output = nn.Linear(hidden + heads * width, bits)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, bits + 2) -> (B, T, bits) logits."""
        hiddens, _ = self.lstm(inputs)
        batch, steps = hiddens.shape[:2]
        said = self.controller.interface(torch.cat((hiddens, inputs), -1).flatten(0, 1))
        interface = MemoryInterface(*(part.view(batch, steps, *part.shape[1:]) for part in said))
        state = self.controller.initial_state(batch)
        if self.plain:
            rows = []
            for t in range(steps):
                read, state = reference.memory_step(state, MemoryInterface(*(part[:, t] for part in interface)))
                rows.append(read)
            reads = torch.stack(rows, 1)
        else:
            reads, _ = memory_scan(state, interface)
        return self.output(torch.cat((hiddens, reads.flatten(2)), -1))


@dataclass
class Training:
    """How a model learned a task: fraction of wrong bits at the logged steps, and its time."""

    task: str
    steps: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(len(self.losses), 1)


def train(
    task: str,
    *,
    seconds: float = 60.0,
    most_steps: int | None = None,
    plain: bool = False,
    batch: int = 32,
    bits: int = 4,
    seed: int = 0,
    target: float = 0.01,
    progress: Callable[[int, float], Any] | None = None,
    **sizes: int,
) -> Training:
    """Train until the moving share of wrong bits is below ``target``, or the time or the steps are over.

    Args:
        task: ``"copy"`` or ``"recall"``.
        seconds: time budget.
        most_steps: step budget, None for none.
        plain: see :class:`SequenceMemory`.
        progress: called with the step and the moving error at every tenth step.
        sizes: ``hidden``, ``slots``, ``width``, ``heads`` of the model.
    """
    torch.manual_seed(seed)
    model = SequenceMemory(bits, plain=plain, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    result, started, moving = Training(task), time.perf_counter(), 0.5
    while most_steps is None or len(result.losses) < most_steps:
        inputs, targets, counts = TASKS[task](batch, bits, SIZES[task], generator)
        logits = model(inputs)[counts]
        loss = functional.binary_cross_entropy_with_logits(logits, targets[counts])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        wrong = ((logits > 0) != targets[counts].bool()).float().mean().item()
        moving += 0.05 * (wrong - moving)
        result.losses.append(loss.item())
        result.seconds = time.perf_counter() - started
        if len(result.losses) % 10 == 0:
            result.steps.append(len(result.losses))
            result.errors.append(moving)
            if progress is not None:
                progress(len(result.losses), moving)
        if moving < target or result.seconds > seconds:
            break
    return result
