"""`mneme report`: a comparison of finished or running runs as Markdown, PNG and one HTML file.

Called by `launch.cli`; `launch.study_report` builds the report of a study from the same pieces.
Everything is read from the run directories, so a report can be made again at any time.
"""

import base64
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.runs import FINAL_STEPS, Row, RunSummary, next_token_loss, read_metrics, summarize
from launch.schema import show

COLORS = ("#2a78d6", "#eb6834", "#1b9e77", "#d6457f", "#5b4bc4", "#b98500", "#0f8ea3", "#8a5a3c")
"""The colours of the dashboard's page; further curves repeat them with dashes."""

_ABSENT = object()
_LONGEST_VALUE = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A loss curve over training tokens."""

    label: str
    tokens: list[int]
    loss: list[float]
    """The line: smoothed, one value per entry of `tokens`."""
    raw: list[float] = field(default_factory=list)
    """Drawn faintly behind the line, if given: what was smoothed."""
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    """Edges of a band around the line, if given."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Held-out losses as (tokens, loss), drawn as dots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a report says; `write` lays it out."""

    title: str
    paragraphs: list[str]
    header: list[str]
    rows: list[list[str]]
    curves: list[Curve]
    notes: list[str]
    """How to read the table and the picture."""

    def write(self, output: Path) -> Path:
        """Write report.md, loss.png and report.html, which needs no other file; returns the last."""
        output.mkdir(parents=True, exist_ok=True)
        picture = output / "loss.png"
        draw_curves(self.curves, picture)
        (output / "report.md").write_text(self._markdown(picture.name), encoding="utf-8")
        page = output / "report.html"
        page.write_text(self._html(picture.read_bytes()), encoding="utf-8")
        return page

    def _markdown(self, picture: str) -> str:
        table = [self.header, ["---"] * len(self.header), *self.rows]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table
        ]
        blocks = [f"# {self.title}", *self.paragraphs, f"![Loss over tokens]({picture})"]
        blocks += ["\n".join(lines), *self.notes]
        return "\n\n".join(blocks) + "\n"

    def _html(self, picture: bytes) -> str:
        def row(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        title = html.escape(self.title)
        data = base64.b64encode(picture).decode()
        return _PAGE.format(
            title=title,
            paragraphs="".join(f"<p>{html.escape(text)}</p>" for text in self.paragraphs),
            picture=f'<img src="data:image/png;base64,{data}" alt="Loss over training tokens">',
            header=row(self.header, "th"),
            rows="\n".join(row(cells, "td") for cells in self.rows),
            notes="".join(f"<p class=note>{html.escape(text)}</p>" for text in self.notes),
        )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ max-width: 1020px; margin: 32px auto; padding: 0 20px; color: #1b1f27; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 24px; letter-spacing: -0.01em; }}
img {{ display: block; width: 100%; margin: 18px 0; }}
.scroll {{ overflow-x: auto; }}
table {{ width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e5ea; }}
th {{ color: #626b7a; font-weight: 600; }}
.note {{ margin: 10px 0; color: #626b7a; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
{paragraphs}
{picture}
<div class="scroll"><table><thead>{header}</thead><tbody>
{rows}
</tbody></table></div>
{notes}
</body></html>
"""


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Compare runs; the first one is what the others are compared with.

    Args:
        runs: run directories.
        output: directory of report.md, loss.png and report.html; made if missing.

    Returns:
        The HTML file.

    Raises:
        ValueError: no run, or a directory that is none or holds no records yet.
    """
    if not runs:
        raise ValueError("runs: none given; name at least one run directory")
    names = run_labels(runs)
    records = [read_records(path) for path in runs]
    recipes = [read_recipe(path) for path in runs]
    described = [
        "" if i == 0 else ", ".join(differences(recipes[0], recipe)) or "nothing"
        for i, recipe in enumerate(recipes)
    ]
    rows = []
    for name, path, run_rows, changed in zip(names, runs, records, described, strict=True):
        summary = summarize(name, path, run_rows)
        rows.append([name, changed, summary.state, *numbers(summary)])
    return Report(
        title=f"Report on {len(runs)} runs" if len(runs) > 1 else f"Report on {names[0]}",
        paragraphs=[],
        header=["run", f"differs from {names[0]} in", "state", *NUMBER_HEADERS],
        rows=rows,
        curves=[run_curve(name, rows) for name, rows in zip(names, records, strict=True)],
        notes=[LOSS_NOTE, "Dots are held-out losses. Speed is the median over the steps."],
    ).write(output)


NUMBER_HEADERS = ("steps", "tokens", "training loss", "held-out loss", "tokens/s")

LOSS_NOTE = (
    "Losses are next-token cross-entropy in nats per token, without multi-token-prediction and "
    f"balance terms. The training loss is the mean over the last {FINAL_STEPS} steps. In the "
    "picture, lines are smoothed by an exponential moving average over about 1/50 of the run."
)


def numbers(summary: RunSummary) -> list[str]:
    """The cells under NUMBER_HEADERS."""
    speed = summary.tokens_per_second
    return [
        f"{summary.step:,}",
        f"{summary.tokens:,}",
        format_loss(summary.final_loss),
        format_loss(summary.validation_loss),
        "-" if speed is None else f"{speed:,.0f}",
    ]


def format_loss(loss: float | None) -> str:
    """A loss for a table; a dash if it was not logged."""
    return "-" if loss is None else f"{loss:.4f}"


def read_records(run_dir: Path) -> list[Row]:
    """The records of a run that has some.

    Raises:
        ValueError: there are none.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(f"{run_dir}: no records in metrics.jsonl; give a run that has trained")
    return rows


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """`recipe.yaml` of a run as it stands there, also that of an older version.

    Raises:
        ValueError: there is none.
    """
    try:
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError) as error:
        raise ValueError(f"{run_dir}: no readable recipe.yaml; give a run directory") from error
    return recipe if isinstance(recipe, dict) else {}


def differences(base: object, other: object, path: str = "") -> Iterator[str]:
    """What to change in recipe `base` to get `other`, as overrides; the shortest ones that say it."""
    if isinstance(base, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*base, *other]):
            if not path and key in ("name", "description"):
                continue
            place = f"{path}.{key}" if path else str(key)
            yield from differences(base.get(key, _ABSENT), other.get(key, _ABSENT), place)
    elif other is _ABSENT:
        yield f"~{path}"
    elif base != other:
        text = show(other)
        yield f"{path}={text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + '...'}"


def run_labels(runs: Sequence[Path]) -> list[str]:
    """Directory names, with the one above where two would be the same."""
    names = [path.resolve().name for path in runs]
    if len(set(names)) == len(names):
        return names
    return ["/".join(path.resolve().parts[-2:]) for path in runs]


def run_curve(label: str, rows: list[Row]) -> Curve:
    """The loss curve of one run: smoothed, with the raw values behind it."""
    tokens, losses = losses_over_tokens(rows)
    held_out = [(row["tokens"], row["validation/loss"]) for row in rows if "validation/loss" in row]
    return Curve(label=label, tokens=tokens, loss=smooth(losses), raw=losses, validation=held_out)


def losses_over_tokens(rows: list[Row]) -> tuple[list[int], list[float]]:
    """Next-token training losses and the tokens trained on by then."""
    pairs = [
        (int(row["tokens"]), loss) for row in rows if (loss := next_token_loss(row)) is not None
    ]
    return [tokens for tokens, _ in pairs], [loss for _, loss in pairs]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about 1/50 of the values, unbiased at the start.

    Not finite values stay as they are and leave no trace in the others.
    """
    weight = 1 - 2 / (max(1, len(values) // 50) + 1)
    mean = mass = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass if math.isfinite(value) else value)
    return smoothed


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw curves into a PNG of about 1350 x 750 pixels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - `mneme list` must not wait for it

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        style = "-" if index < len(COLORS) else "--"
        if curve.raw:
            axes.plot(curve.tokens, curve.raw, color=color, linewidth=0.7, alpha=0.25)
        if curve.low:
            axes.fill_between(
                curve.tokens, curve.low, curve.high, color=color, alpha=0.18, linewidth=0
            )
        axes.plot(curve.tokens, curve.loss, style, color=color, linewidth=1.7, label=curve.label)
        if curve.validation:
            axes.plot(*zip(*curve.validation, strict=True), "o", color=color, markersize=4.5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("next-token loss (nats per token)")
    axes.xaxis.set_major_formatter(_format_tokens)
    axes.grid(color="#eceef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bfca")
    axes.legend(frameon=False)
    figure.savefig(path)


def _format_tokens(tokens: float, position: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
