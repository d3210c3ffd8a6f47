"""Plot files without a display: the one place that knows matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VISUALIZATION_AVAILABLE = importlib.util.find_spec("matplotlib") is not None

Array = Any  # a tensor on any device, an array, or nested lists of numbers


def new_figure(figsize: tuple[float, float] = (8, 5), dpi: int = 100) -> Figure:
    """An empty figure that no window manager knows of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not VISUALIZATION_AVAILABLE:
        raise ImportError("plots need matplotlib: install the extra memkern[plot]")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending, making the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def as_array(name: str, values: Array, *ranks: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values as float64 on the host, detached.

    Raises:
        ValueError: a rank that is not among ``ranks``.
    """
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if ranks and array.ndim not in ranks:
        raise ValueError(f"{name}: expected {' or '.join(map(str, ranks))} axes, got shape {array.shape}")
    return array
