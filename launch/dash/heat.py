"""Heat maps of a run: gains by site and step, load by expert. Called by `server` and by reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.dash.table import Numbers, RunTable
from launch.runs import JsonLines, Row
from train.expert_load import EXPERT_LOAD_FILE, decode

COLUMNS = 200
"""At most so many columns: of more steps each column is the worst of some, of loads the last."""
LOAD = "moe/expert_load"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A matrix with labels."""

    kind: str
    rows: str
    """What a row is; rows count from 0."""
    columns: str
    """What a column is."""
    places: list[float]
    """Of the columns."""
    values: Numbers
    """[rows, columns]; NaN where nothing was measured."""
    center: float = 1.0
    """The value that is neither high nor low: both gains and loads are even at 1."""


class Loads:
    """The rows of `expert_load.jsonl`, read as far as the last poll."""

    def __init__(self, run_dir: Path) -> None:
        self._file = JsonLines(run_dir / EXPERT_LOAD_FILE)
        self.rows: list[Row] = []

    def poll(self) -> None:
        """Read what is new."""
        rows = list(self._file.poll(self.rows.clear))
        self.rows += rows

    def layers(self) -> int:
        """Layers with experts."""
        return int(self.rows[-1]["layers"]) if self.rows else 0

    def latest(self) -> HeatMap:
        """Load of every expert in the newest row: layers x experts."""
        row = self.rows[-1]
        return HeatMap(
            kind=LOAD,
            rows="MoE layer",
            columns=f"expert, at step {row['step']}",
            places=list(range(int(row["experts"]))),
            values=decode(row),
        )

    def of_layer(self, layer: int) -> HeatMap:
        """Load of one layer's experts over the steps: experts x steps."""
        stride = -(-len(self.rows) // COLUMNS)
        chosen = self.rows[::-1][::stride][::-1]
        return HeatMap(
            kind=LOAD,
            rows=f"expert of MoE layer {layer}",
            columns="step",
            places=[float(row["step"]) for row in chosen],
            values=np.stack([decode(row)[layer] for row in chosen], axis=1),
        )


def sites(table: RunTable, kind: str) -> HeatMap | None:
    """A quantity of all sites over the steps, the largest of each column; None: it has no sites."""
    metrics = table.sites().get(kind)
    if metrics is None:
        return None
    series = [table.values(metric, "step") for metric in metrics]
    steps = max((x for x, _ in series), key=len)
    length = len(steps)
    values = np.stack([_padded(y, length) for _, y in series])
    starts = np.arange(0, length, -(-length // COLUMNS))
    return HeatMap(
        kind=kind,
        rows="site (attention 2l, feed-forward 2l + 1)",
        columns="step",
        places=steps[np.append(starts[1:], length) - 1].tolist(),
        values=np.fmax.reduceat(values, starts, axis=1),
    )


def _padded(values: Numbers, length: int) -> Numbers:
    return np.append(values, np.full(length - len(values), np.nan))


def kinds(names: Sequence[str]) -> list[str]:
    """Quantities by site that have a heat map, gains first."""
    return sorted(names, key=lambda name: ("gain" not in name, name))
