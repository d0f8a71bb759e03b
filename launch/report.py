"""`mneme report`: what runs did, side by side: Markdown, pictures, and one HTML file with everything.

Called by `launch.cli`. Everything is read from the run directories, so a report can be made again
at any time, also of runs that go on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from launch.compare import (
    LOSS_NOTE,
    Block,
    Curve,
    Picture,
    Report,
    differences,
    format_loss,
    read_recipe,
    run_labels,
    smooth,
)
from launch.dash.heat import HeatMap, Loads, sites
from launch.dash.table import Numbers, RunTable
from launch.pictures import Line, draw_heat_maps, draw_panels
from launch.runs import FINAL_STEPS, read_status

HEADERS = (
    *("run", "state", "steps", "tokens", "training loss", "held-out loss", "tokens/s", "MFU"),
    *("device hours", "restarts", "alarms"),
)
PANELS = (
    *("loss_mtp", "validation/loss", "grad_norm", "learning_rate", "tokens_per_second"),
    *("model_flops_utilization", "peak_memory_bytes", "mhc/composite_gain_forward"),
    *("mhc/composite_gain_backward", "mhc/stream_norm_ratio", "moe/load_max_over_mean"),
    *("moe/router_entropy", "engram/gate_mean", "dsa/indexer_kl"),
)
"""Metrics that a report draws beside the loss, those that a run has."""
_HEAT_KINDS = (
    *("mhc/gain_forward", "mhc/gain_backward", "mhc/composite_forward", "mhc/composite_backward"),
)
_QUIET = ("checkpoint", "start", "skipped_sample")
_MOST_EVENTS = 30
_MOST_POINTS = 2000


@dataclass(frozen=True)
class _Run:
    name: str
    path: Path
    table: RunTable

    @classmethod
    def read(cls, name: str, path: Path) -> "_Run":
        table = RunTable(path)
        while not table.poll():
            pass
        if not table.last:
            raise ValueError(f"{path}: no records in metrics.jsonl; give a run that has trained")
        return cls(name, path, table)

    def last(self, metric: str) -> float | None:
        """Mean over the last FINAL_STEPS records of a metric."""
        values = self.table.values(metric, "step")[1]
        return fmean(values[-FINAL_STEPS:].tolist()) if len(values) else None

    @property
    def loss(self) -> str:
        """The metric that may be compared between models."""
        return "loss_main" if "loss_main" in self.table.columns else "loss"

    def held_out(self) -> tuple[Numbers, Numbers]:
        """Held-out losses over tokens."""
        return self.table.values("validation/loss", "tokens")

    def count(self, *events: str) -> int:
        return sum(event["event"] in events for event in self.table.events)

    def device_hours(self) -> float:
        """Of all ranks in optimizer steps; start-up, evaluation and lost steps are not in it."""
        seconds = self.table.values("step_seconds", "step")[1].sum()
        return float(seconds) * int(read_status(self.path).get("ranks", 1)) / 3600


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Compare runs; the first one is what the others are compared with.

    Args:
        runs: run directories.
        output: directory of report.md, report.html and the pictures; made if missing.

    Returns:
        The HTML file, which needs no other.

    Raises:
        ValueError: no run, or a directory that is none or holds no records yet.
    """
    if not runs:
        raise ValueError("runs: none given; name at least one run directory")
    names = run_labels(runs)
    read = [_Run.read(name, path) for name, path in zip(names, runs, strict=True)]
    recipes = [read_recipe(path) for path in runs]
    changes = [list(differences(recipes[0], recipe)) for recipe in recipes]
    return Report(
        title=f"Report on {len(runs)} runs" if len(runs) > 1 else f"Report on {names[0]}",
        paragraphs=[
            f"{name} differs from {names[0]} in {', '.join(changed) or 'nothing'}."
            for name, changed in list(zip(names, changes, strict=True))[1:]
        ],
        header=list(HEADERS),
        rows=[_row(run) for run in read],
        curves=[_curve(run) for run in read],
        notes=[
            LOSS_NOTE,
            "Dots are held-out losses. Speed and utilization (MFU) are medians over the steps. Device "
            "hours are those of all ranks in optimizer steps.",
        ],
        blocks=[*_panels(read), *_heat_maps(read), _final_values(read), *_events(read)],
    ).write(output)


def _row(run: _Run) -> list[str]:
    held_out = run.held_out()[1]
    return [
        run.name,
        str(read_status(run.path).get("state", "unknown")),
        f"{int(run.table.last.get('step', 0)):,}",
        f"{int(run.table.last.get('tokens', 0)):,}",
        format_loss(run.last(run.loss)),
        format_loss(float(held_out[-1]) if len(held_out) else None),
        _median(run, "tokens_per_second", "{:,.0f}"),
        _median(run, "model_flops_utilization", "{:.1%}"),
        f"{run.device_hours():.3g}",
        str(run.count("resume")),
        str(run.count("alarm")),
    ]


def _median(run: _Run, metric: str, form: str) -> str:
    values = run.table.values(metric, "step")[1]
    return form.format(float(np.median(values))) if len(values) else "-"


def _curve(run: _Run) -> Curve:
    tokens, losses = run.table.values(run.loss, "tokens")
    smoothed = smooth(losses.tolist())
    chosen = _spread(len(tokens))
    held_out = [(int(at), float(loss)) for at, loss in zip(*run.held_out(), strict=True)]
    return Curve(
        label=run.name,
        tokens=[int(tokens[i]) for i in chosen],
        loss=[smoothed[i] for i in chosen],
        raw=[float(losses[i]) for i in chosen],
        validation=held_out,
    )


def _spread(length: int) -> list[int]:
    """At most so many places, first and last among them: a picture has no more pixels."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(length, _MOST_POINTS))})


def _panels(runs: Sequence[_Run]) -> list[Block]:
    metrics = {metric: _lines(runs, metric) for metric in PANELS}
    there = {metric: lines for metric, lines in metrics.items() if lines}
    if not there:
        return []
    picture = Picture("metrics.png", "Other metrics over training tokens", partial(_draw, there))
    return [Block("Metrics", picture=picture)]


def _draw(metrics: dict[str, list[Line]], path: Path) -> None:
    draw_panels(metrics, path)


def _lines(runs: Sequence[_Run], metric: str) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        tokens, values = run.table.values(metric, "tokens")
        if len(tokens):
            chosen = _spread(len(tokens))
            smoothed = np.array(smooth(values.tolist()))
            line = Line(
                run=index, tokens=tokens[chosen], values=smoothed[chosen], raw=values[chosen]
            )
            lines.append(line)
    return lines


def _heat_maps(runs: Sequence[_Run]) -> list[Block]:
    blocks = []
    for index, run in enumerate(runs):
        maps: list[HeatMap] = [
            found for kind in _HEAT_KINDS if (found := sites(run.table, kind)) is not None
        ]
        loads = Loads(run.path)
        loads.poll()
        maps += [loads.latest()] if loads.rows else []
        if maps:
            draw: Callable[[Path], None] = partial(draw_heat_maps, maps)
            picture = Picture(f"heat-{index}.png", f"Heat maps of {run.name}", draw)
            blocks.append(Block(f"Gains and loads of {run.name}", picture=picture))
    return blocks


def _final_values(runs: Sequence[_Run]) -> Block:
    names = dict.fromkeys(name for run in runs for name in run.table.names())
    rows = []
    for name in names:
        if name not in ("step", "tokens"):
            values = [run.last(name) for run in runs]
            rows.append([name, *("-" if value is None else f"{value:.5g}" for value in values)])
    title = f"Final values (means over the last {FINAL_STEPS} records)"
    return Block(title, header=["metric", *(run.name for run in runs)], rows=rows)


def _events(runs: Sequence[_Run]) -> list[Block]:
    rows = [
        [run.name, str(event["step"]), event["event"], str(event["detail"])]
        for run in runs
        for event in [e for e in run.table.events if e["event"] not in _QUIET][-_MOST_EVENTS:]
    ]
    counts = Counter(event["event"] for run in runs for event in run.table.events)
    said = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    title = f"Events: {said}" if said else "Events: none"
    return [Block(title, header=["run", "step", "event", "detail"], rows=rows)] if counts else []
