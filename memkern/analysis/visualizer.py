"""Plots of memory: reads, writes, usage, links, heads, over the segments of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memkern.analysis.figures import Array, as_array, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Values = np.ndarray[Any, np.dtype[np.float64]]


def _heads(name: str, weights: Array) -> Values:
    """(H, N) of (N,), (H, N) or the first row of (B, H, N)."""
    array = as_array(name, weights, 1, 2, 3)
    return array[None] if array.ndim == 1 else array[0] if array.ndim == 3 else array


class MemoryVisualizer:
    """Draws what a model's ``memory_info`` holds, on any device; no display is needed.

    Every plot returns its figure and writes it where ``save_path`` is given.

    Args:
        output_dir: folder that the paths of the plots over segments are relative to, made when the first is written.
        figsize, dpi, colormap: of every figure.

    Raises:
        ImportError: at the first plot, when matplotlib is not installed (extra ``memkern[plot]``).
    """

    def __init__(
        self,
        output_dir: str | Path = "./visualizations",
        figsize: tuple[float, float] = (12, 8),
        dpi: int = 100,
        colormap: str = "viridis",
    ) -> None:
        self.output_dir, self.figsize, self.dpi, self.colormap = Path(output_dir), figsize, dpi, colormap

    @staticmethod
    def plot_memory_heatmap(
        memory_state: Array,
        title: str = "memory state",
        cmap: str = "coolwarm",
        *,
        save_path: str | Path | None = None,
    ) -> Figure:
        """Slots by width: (N, W), or the first row of (B, N, W); zero in the middle of the colours."""
        values = _heads("memory_state", memory_state)
        figure = new_figure((12, 8))
        axes = figure.add_subplot()
        limit = max(abs(values).max(initial=0.0), 1e-12)
        figure.colorbar(axes.imshow(values, aspect="auto", cmap=cmap, vmin=-limit, vmax=limit), label="value")
        axes.set(xlabel="width", ylabel="memory slot", title=title)
        if save_path is not None:
            save_figure(figure, save_path)
        return figure

    @staticmethod
    def plot_usage_pattern(
        usage: Array, temporal_links: Array | None = None, *, save_path: str | Path | None = None
    ) -> Figure:
        """Usage of every slot, (N,) or the first row of (B, N), beside the links (N, N) as [from, to] if given."""
        used = as_array("usage", usage, 1, 2)
        used = used[0] if used.ndim == 2 else used
        figure = new_figure((14, 6) if temporal_links is not None else (7, 6))
        panels = figure.subplots(1, 1 if temporal_links is None else 2, squeeze=False)[0]
        panels[0].bar(range(len(used)), used)
        panels[0].set(xlabel="memory slot", ylabel="usage", ylim=(0, 1), title="usage")
        if temporal_links is not None:
            image = panels[1].imshow(_heads("temporal_links", temporal_links), cmap="Blues")
            figure.colorbar(image, ax=panels[1], label="link")
            panels[1].set(xlabel="to slot", ylabel="from slot", title="temporal links")
        if save_path is not None:
            save_figure(figure, save_path)
        return figure

    def plot_attention_heatmap(
        self,
        weights: Array,
        title: str = "attention weights",
        save_path: str | Path | None = None,
        xlabel: str = "memory slot",
        ylabel: str = "head",
        show_values: bool = False,
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """Heads by slots: (N,), (H, N), or the first row of (B, H, N)."""
        values = _heads("weights", weights)
        figure = self._figure(figsize)
        axes = figure.add_subplot()
        figure.colorbar(axes.imshow(values, aspect="auto", cmap=self.colormap, vmin=0), label="weight")
        if show_values:
            for (row, column), value in np.ndenumerate(values):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, yticks=range(len(values)))
        return self._saved(figure, save_path)

    def plot_usage_timeline(
        self,
        usage_history: Array,
        save_path: str | Path | None = None,
        title: str = "memory usage over segments",
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """Usage of every slot after every segment: (T, N), or a sequence of (N,) or of (B, N), whose first row."""
        figure = self._figure(figsize)
        axes = figure.add_subplot()
        rows = self._history("usage_history", usage_history, 1)
        figure.colorbar(axes.imshow(rows.T, aspect="auto", cmap=self.colormap, origin="lower"), label="usage")
        axes.set(xlabel="segment", ylabel="memory slot", title=title)
        return self._saved(figure, save_path)

    def plot_temporal_links(
        self,
        temporal_links: Array,
        save_path: str | Path | None = None,
        title: str = "temporal links",
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """Which slot was written after which: (N, N) as [from, to], or the first row of (B, N, N)."""
        figure = self._figure(figsize)
        axes = figure.add_subplot()
        figure.colorbar(axes.imshow(_heads("temporal_links", temporal_links), cmap=self.colormap), label="link")
        axes.set(xlabel="to slot", ylabel="from slot", title=title)
        return self._saved(figure, save_path)

    def plot_multi_head_comparison(
        self,
        heads_weights: Array,
        save_path: str | Path | None = None,
        title: str = "heads",
        operation: str = "read",
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """One panel a head: (H, N), or the first row of (B, H, N)."""
        values = _heads("heads_weights", heads_weights)
        figure = self._figure(figsize)
        panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
        for head, axes in enumerate(panels):
            axes.bar(range(values.shape[1]), values[head])
            axes.set(ylabel=f"head {head}")
        panels[-1].set(xlabel="memory slot")
        figure.suptitle(f"{title}, {operation} weights")
        return self._saved(figure, save_path)

    def plot_attention_distribution(
        self,
        read_weights: Array,
        write_weights: Array,
        save_path: str | Path | None = None,
        title: str = "distribution of weights",
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """Histograms of read and write weights of any shape."""
        figure = self._figure(figsize)
        pairs = (("read", read_weights), ("write", write_weights))
        for axes, (name, weights) in zip(figure.subplots(1, 2), pairs, strict=True):
            axes.hist(as_array(f"{name}_weights", weights).ravel(), bins=30)
            axes.set(xlabel="weight", ylabel="count", title=name)
        figure.suptitle(title)
        return self._saved(figure, save_path)

    def create_animation(
        self,
        segment_data: Sequence[Mapping[str, Array]],
        output_path: str | Path,
        fps: int = 2,
        title: str = "memory over segments",
    ) -> Path:
        """A frame a segment: read weights, write weights and, where it is there, usage.

        Args:
            segment_data: a ``memory_info`` for each segment.
            output_path: relative to ``output_dir``; .gif, or what an installed ffmpeg writes.

        Raises:
            ValueError: no segments.
        """
        if not len(segment_data):
            raise ValueError("segment_data: expected at least one segment, got none")
        figure = self._figure()
        from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter

        panels = figure.subplots(1, 3)

        def show(frame: int) -> list[Any]:
            drawn: list[Any] = []
            for axes, name in zip(panels, ("read_weights", "write_weights", "usage"), strict=True):
                axes.clear()
                values = segment_data[frame].get(name)
                if values is not None and name == "usage":
                    drawn += axes.bar(*self._bars(values))
                    axes.set(ylim=(0, 1))
                elif values is not None:
                    drawn.append(axes.imshow(_heads(name, values), aspect="auto", cmap=self.colormap))
                axes.set(title=name.replace("_", " "), xlabel="memory slot")
            figure.suptitle(f"{title}: segment {frame}")
            return drawn

        path = self.output_dir / output_path
        path.parent.mkdir(parents=True, exist_ok=True)
        animation = FuncAnimation(figure, show, frames=len(segment_data), interval=1000 // fps)
        animation.save(path, writer=PillowWriter(fps=fps) if path.suffix == ".gif" else FFMpegWriter(fps=fps))
        return path

    def create_summary_report(
        self, memory_data: Mapping[str, Array], save_path: str | Path = "summary_report"
    ) -> list[Path]:
        """One file for each thing in ``memory_data``: ``<save_path>_read_attention.png`` and so on.

        Args:
            memory_data: histories over segments, T first: ``read_weights``, ``write_weights`` (T, H, N), ``usage``
                (T, N), ``temporal_links`` (T, N, N); the last segment is drawn, of usage all.

        Raises:
            ValueError: none of these is in it.
        """
        given = {name: value for name, value in memory_data.items() if value is not None}
        paths: list[Path] = []

        def path(name: str) -> str:
            paths.append(self.output_dir / f"{save_path}_{name}.png")
            return f"{save_path}_{name}.png"

        for kind in ("read", "write"):
            if f"{kind}_weights" in given:
                self.plot_attention_heatmap(
                    given[f"{kind}_weights"][-1], f"last {kind} weights", path(f"{kind}_attention")
                )
        if "usage" in given:
            self.plot_usage_timeline(given["usage"], path("usage_timeline"))
        if "temporal_links" in given:
            self.plot_temporal_links(given["temporal_links"][-1], path("temporal_links"))
        if "read_weights" in given and "write_weights" in given:
            self.plot_attention_distribution(
                given["read_weights"][-1], given["write_weights"][-1], path("distribution")
            )
        if not paths:
            raise ValueError(
                f"memory_data: expected read_weights, write_weights, usage or temporal_links, got {sorted(memory_data)}"
            )
        return paths

    def _figure(self, figsize: tuple[float, float] | None = None) -> Figure:
        return new_figure(figsize or self.figsize, self.dpi)

    def _saved(self, figure: Figure, save_path: str | Path | None) -> Figure:
        if save_path is not None:
            save_figure(figure, self.output_dir / save_path)
        return figure

    @staticmethod
    def _bars(usage: Array) -> tuple[range, Values]:
        used = _heads("usage", usage)[0]
        return range(len(used)), used

    @staticmethod
    def _history(name: str, values: Array, rank: int) -> Values:
        """(T, ...) with entries of ``rank`` axes; of entries with a batch the first row."""
        if not len(values):
            raise ValueError(f"{name}: expected at least one segment, got none")
        rows = [as_array(name, value, rank, rank + 1) for value in values]
        return np.stack([row[0] if row.ndim > rank else row for row in rows])
