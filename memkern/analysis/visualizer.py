"""Plots of memory: reads, usage, links, heads; each a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memkern.analysis.figures import Array, as_array, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _row(name: str, values: Array, rank: int) -> np.ndarray[Any, Any]:
    """Of a batch the first row."""
    array = as_array(name, values, rank, rank + 1)
    return array[0] if array.ndim == rank + 1 else array


class MemoryVisualizer:
    """Draws what a model's ``memory_info`` holds. Every method writes one file and returns its path.

    Args:
        output_dir: folder for the files, made when the first is written.
        figsize, dpi, colormap: of every figure.

    Raises:
        ImportError: at the first plot, when matplotlib is not installed (extra ``memkern[plot]``).
    """

    def __init__(
        self,
        output_dir: str | Path = "memory_plots",
        figsize: tuple[float, float] = (12, 8),
        dpi: int = 100,
        colormap: str = "viridis",
    ) -> None:
        self.output_dir, self.figsize, self.dpi, self.colormap = Path(output_dir), figsize, dpi, colormap

    def _figure(self) -> Figure:
        return new_figure(self.figsize, self.dpi)

    def _save(self, figure: Figure, default: str, save_path: str | Path | None) -> Path:
        return save_figure(figure, save_path or self.output_dir / default)

    def _image(self, figure: Figure, axes: Any, values: np.ndarray[Any, Any], label: str) -> None:
        figure.colorbar(axes.imshow(values, aspect="auto", cmap=self.colormap), ax=axes, label=label)

    def plot_memory_heatmap(
        self, memory_state: Array, title: str = "memory", save_path: str | Path | None = None
    ) -> Path:
        """Slots by width: (N, W), or the first row of (B, N, W)."""
        figure = self._figure()
        axes = figure.add_subplot()
        self._image(figure, axes, _row("memory_state", memory_state, 2), "value")
        axes.set(xlabel="width", ylabel="slot", title=title)
        return self._save(figure, "memory_heatmap.png", save_path)

    def plot_usage_pattern(self, usage: Array, title: str = "usage", save_path: str | Path | None = None) -> Path:
        """Usage of every slot in [0, 1]: (N,), or the first row of (B, N)."""
        figure = self._figure()
        axes = figure.add_subplot()
        values = _row("usage", usage, 1)
        axes.bar(range(len(values)), values)
        axes.set(xlabel="slot", ylabel="usage", ylim=(0, 1), title=title)
        return self._save(figure, "usage_pattern.png", save_path)

    def plot_attention_heatmap(
        self,
        attention_weights: Array,
        title: str = "attention",
        tokens: Sequence[str] | None = None,
        save_path: str | Path | None = None,
    ) -> Path:
        """Heads by slots or tokens: (H, N), or the first row of (B, H, N)."""
        figure = self._figure()
        axes = figure.add_subplot()
        values = _row("attention_weights", attention_weights, 2)
        self._image(figure, axes, values, "weight")
        if tokens is not None:
            axes.set_xticks(range(len(tokens)), list(tokens), rotation=90)
        axes.set(xlabel="slot", ylabel="head", title=title)
        return self._save(figure, "attention_heatmap.png", save_path)

    def plot_usage_timeline(
        self, usages: Sequence[Array], title: str = "usage over segments", save_path: str | Path | None = None
    ) -> Path:
        """Usage of every slot after every segment: a sequence of (N,) or (B, N)."""
        rows = self._series("usages", usages, 1)
        figure = self._figure()
        axes = figure.add_subplot()
        self._image(figure, axes, rows.T, "usage")
        axes.set(xlabel="segment", ylabel="slot", title=title)
        return self._save(figure, "usage_timeline.png", save_path)

    def plot_temporal_links(
        self, temporal_links: Array, title: str = "temporal links", save_path: str | Path | None = None
    ) -> Path:
        """Which slot was written after which: (N, N) as [from, to], or the first row of (B, N, N)."""
        figure = self._figure()
        axes = figure.add_subplot()
        self._image(figure, axes, _row("temporal_links", temporal_links, 2), "link")
        axes.set(xlabel="to slot", ylabel="from slot", title=title)
        return self._save(figure, "temporal_links.png", save_path)

    def plot_multi_head_comparison(
        self, attention_weights: Array, title: str = "heads", save_path: str | Path | None = None
    ) -> Path:
        """One panel a head: (H, N), or the first row of (B, H, N)."""
        values = _row("attention_weights", attention_weights, 2)
        figure = self._figure()
        panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)
        for head, axes in enumerate(panels[:, 0]):
            axes.bar(range(values.shape[1]), values[head])
            axes.set(ylabel=f"head {head}")
        panels[-1, 0].set(xlabel="slot")
        figure.suptitle(title)
        return self._save(figure, "multi_head_comparison.png", save_path)

    def plot_attention_distribution(
        self, attention_weights: Array, title: str = "distribution of weights", save_path: str | Path | None = None
    ) -> Path:
        """Histogram of weights of any shape."""
        figure = self._figure()
        axes = figure.add_subplot()
        axes.hist(as_array("attention_weights", attention_weights).ravel(), bins=40)
        axes.set(xlabel="weight", ylabel="count", title=title)
        return self._save(figure, "attention_distribution.png", save_path)

    def create_animation(
        self,
        attention_weights: Sequence[Array],
        title: str = "attention",
        interval: int = 500,
        save_path: str | Path | None = None,
    ) -> Path:
        """A GIF with a frame a segment: a sequence of (H, N) or (B, H, N); ``interval`` milliseconds each."""
        frames = self._series("attention_weights", attention_weights, 2)
        figure = self._figure()
        from matplotlib.animation import FuncAnimation, PillowWriter

        axes = figure.add_subplot()
        image = axes.imshow(frames[0], aspect="auto", cmap=self.colormap, vmin=0, vmax=max(frames.max(), 1e-12))
        figure.colorbar(image, label="weight")
        axes.set(xlabel="slot", ylabel="head")

        def show(frame: int) -> tuple[Any]:
            image.set_data(frames[frame])
            axes.set_title(f"{title}, segment {frame}")
            return (image,)

        path = Path(save_path or self.output_dir / "attention.gif")
        path.parent.mkdir(parents=True, exist_ok=True)
        animation = FuncAnimation(figure, show, frames=len(frames), interval=interval)
        animation.save(path, writer=PillowWriter(fps=max(1, round(1000 / interval))))
        return path

    def create_summary_report(
        self, memory_info: Mapping[str, Any], title: str = "memory", save_path: str | Path | None = None
    ) -> Path:
        """All of a ``memory_info`` in one figure: what it lacks is left out.

        Raises:
            ValueError: nothing in it can be drawn.
        """
        names = ("read_weights", "write_weights", "usage", "temporal_links", "memory_state")
        shown = [name for name in names if memory_info.get(name) is not None]
        if not shown:
            raise ValueError(f"memory_info: expected one of {', '.join(names)}, got {sorted(memory_info)}")
        figure = self._figure()
        panels = figure.subplots(-(-len(shown) // 2), min(2, len(shown)), squeeze=False).ravel()
        for axes, name in zip(panels, shown, strict=False):
            values = _row(name, memory_info[name], 1 if name == "usage" else 2)
            if name == "usage":
                axes.bar(range(len(values)), values)
                axes.set(ylim=(0, 1))
            else:
                self._image(figure, axes, values, "")
            axes.set(title=name.replace("_", " "))
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        figure.suptitle(title)
        return self._save(figure, "memory_summary.png", save_path)

    @staticmethod
    def _series(name: str, values: Sequence[Array], rank: int) -> np.ndarray[Any, Any]:
        if not len(values):
            raise ValueError(f"{name}: expected at least one segment, got none")
        return np.stack([_row(name, value, rank) for value in values])
