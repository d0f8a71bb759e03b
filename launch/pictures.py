"""Pictures of reports: small curves of many metrics, and heat maps. Called by `launch.report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.compare import COLORS, format_tokens
from launch.dash.heat import HeatMap
from launch.dash.table import Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_FAR = 1.02
"""Ratios nearer to even than this stay pale, as in the dashboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A metric of one run over training tokens."""

    run: int
    """Its number, which gives the colour."""
    tokens: Numbers
    values: Numbers
    """The line: smoothed."""
    raw: Numbers
    """Drawn faintly behind it."""


def draw_panels(metrics: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Draw one small plot a metric, all runs in each, into a PNG 1350 pixels wide."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - `mneme list` must not wait for it
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    rows = -(-len(metrics) // _COLUMNS)
    figure = Figure(figsize=(9, 2.1 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, (metric, lines) in zip(grid.flat, metrics.items(), strict=False):
        for line in lines:
            style = "-" if line.run < len(COLORS) else "--"
            color = COLORS[line.run % len(COLORS)]
            axes.plot(line.tokens, line.raw, color=color, linewidth=0.5, alpha=0.25)
            axes.plot(line.tokens, line.values, style, color=color, linewidth=1.1)
        _plain(axes, metric)
        axes.xaxis.set_major_formatter(format_tokens)
        if max(float(np.nanmax(line.values)) for line in lines) >= 1e4:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#eceef2")
    for axes in grid.flat[len(metrics) :]:
        axes.set_visible(False)
    figure.savefig(path)


def draw_heat_maps(maps: Sequence[HeatMap], path: Path) -> None:
    """Draw heat maps below each other, blue below and red above the even value, by ratio."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    colors = LinearSegmentedColormap.from_list("even", ["#2a6fd6", "#f4f5f7", "#ce342b"])
    figure = Figure(figsize=(9, 2.3 * len(maps)), dpi=150, layout="constrained")
    for axes, heat in zip(figure.subplots(len(maps), 1, squeeze=False).flat, maps, strict=True):
        positive = heat.values[np.isfinite(heat.values) & (heat.values > 0)] / heat.center
        far = max(_FAR, *(np.exp(np.abs(np.log(positive))) if positive.size else [_FAR]))
        norm = LogNorm(heat.center / far, heat.center * far, clip=True)
        # An expert without a token is as far below as can be.
        values = np.where(heat.values <= 0, heat.center / far, heat.values)
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
        _plain(axes, heat.kind)
        ticks = np.unique(np.linspace(0, len(heat.places) - 1, 9).astype(int))
        axes.set_xticks(ticks, [f"{heat.places[tick]:g}" for tick in ticks])
        axes.set_xlabel(heat.columns, fontsize=8)
        axes.set_ylabel(heat.rows.partition(" (")[0], fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        ends = (heat.center / far, heat.center, heat.center * far)
        bar.ax.minorticks_off()
        bar.set_ticks(ends, labels=[f"{end:.4g}" for end in ends], fontsize=7)
    figure.savefig(path)


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
