"""How a report looks, as Markdown, PNG and one HTML file, and how recipes and losses are compared.

`launch.report` (of runs) and `launch.study_report` (of a study) are made of these pieces.
"""

import base64
import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from launch.runs import FINAL_STEPS, Row, next_token_loss, read_metrics
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


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG of a report."""

    name: str
    """Of the file."""
    alt: str
    """What it shows."""
    draw: Callable[[Path], None]
    """Writes the file."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a report below its main table: a picture, a table, or both."""

    title: str
    picture: Picture | None = None
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


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
    blocks: Sequence[Block] = ()
    """Further parts."""

    def write(self, output: Path) -> Path:
        """Write report.md, its PNGs and report.html, which needs no other file; returns the last."""
        output.mkdir(parents=True, exist_ok=True)
        pictures = [block.picture for block in self.blocks if block.picture]
        main = Picture("loss.png", "Loss over training tokens", partial(draw_curves, self.curves))
        for picture in (main, *pictures):
            picture.draw(output / picture.name)
        (output / "report.md").write_text(self._markdown(main), encoding="utf-8")
        page = output / "report.html"
        page.write_text(self._html(main, output), encoding="utf-8")
        return page

    def _markdown(self, main: Picture) -> str:
        parts = [f"# {self.title}", *self.paragraphs, _markdown_picture(main)]
        parts += [_markdown_table(self.header, self.rows), *self.notes]
        for block in self.blocks:
            parts.append(f"## {block.title}")
            parts += [_markdown_picture(block.picture)] if block.picture else []
            parts += [_markdown_table(block.header, block.rows)] if block.rows else []
        return "\n\n".join(parts) + "\n"

    def _html(self, main: Picture, output: Path) -> str:
        parts = [f"<p>{html.escape(text)}</p>" for text in self.paragraphs]
        parts += [_html_picture(main, output), _html_table(self.header, self.rows)]
        parts += [f"<p class=note>{html.escape(text)}</p>" for text in self.notes]
        for block in self.blocks:
            parts.append(f"<h2>{html.escape(block.title)}</h2>")
            parts += [_html_picture(block.picture, output)] if block.picture else []
            parts += [_html_table(block.header, block.rows)] if block.rows else []
        return _PAGE.format(title=html.escape(self.title), parts="\n".join(parts))


def _markdown_picture(picture: Picture) -> str:
    return f"![{picture.alt}]({picture.name})"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table
    )


def _html_picture(picture: Picture, output: Path) -> str:
    data = base64.b64encode((output / picture.name).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}">'


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    head = row(header, "th")
    return (
        f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><link rel="icon" href="data:,">
<style>
body {{ max-width: 1020px; margin: 32px auto; padding: 0 20px; color: #1b1f27; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 24px; letter-spacing: -0.01em; }}
h2 {{ margin: 34px 0 8px; font-size: 17px; }}
img {{ display: block; width: 100%; margin: 18px 0; }}
.scroll {{ overflow-x: auto; }}
table {{ width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e5ea; }}
th {{ color: #626b7a; font-weight: 600; }}
.note {{ margin: 10px 0; color: #626b7a; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
{parts}
</body></html>
"""


LOSS_NOTE = (
    "Losses are next-token cross-entropy in nats per token, without multi-token-prediction and "
    f"balance terms. The training loss is the mean over the last {FINAL_STEPS} steps. In the "
    "picture, lines are smoothed by an exponential moving average over about 1/50 of the run."
)


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
    axes.xaxis.set_major_formatter(format_tokens)
    axes.grid(color="#eceef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bfca")
    axes.legend(frameon=False)
    figure.savefig(path)


def format_tokens(tokens: float, position: float) -> str:
    """A number of tokens for an axis of matplotlib."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
