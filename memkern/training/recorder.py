"""What a run tells while it runs: a history in memory, TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainerState:
    """Where a run stands. ``log_history`` has a dictionary for every logging step and every evaluation."""

    global_step: int = 0
    epoch: float = 0.0
    stage: int = 0
    best_metric: float | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)


class Recorder:
    """Writes entries to a state's history and, on the main process, to TensorBoard."""

    def __init__(self, state: TrainerState, folder: Path | None) -> None:
        self.state = state
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn("no TensorBoard curves: install the extra memkern[train], or tensorboard=False", stacklevel=3)
            return
        self.writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def log(self, entry: dict[str, Any], prefix: str = "train") -> None:
        """Add an entry under the present step and epoch."""
        stamped = {"step": self.state.global_step, "epoch": round(self.state.epoch, 4), **entry}
        self.state.log_history.append(stamped)
        if self.writer is not None:
            for name, value in entry.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{prefix}/{name}", value, self.state.global_step)

    def close(self) -> None:
        """Flush the curves."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Bar:
    """A progress bar that may be absent."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=text)


@contextlib.contextmanager
def progress_bar(shown: bool, title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar over ``total`` steps on standard error, where it is a terminal."""
    if not shown:
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done))
