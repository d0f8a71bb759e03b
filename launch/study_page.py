"""Lays a report out: Markdown beside its pictures, and one HTML file that needs no other.

Called by `launch.study_report`, which says what the report holds.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.compare import COLORS, Curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells of text."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Curves over training tokens, drawn into a PNG."""

    file: str
    caption: str
    label: str
    """Of the vertical axis."""
    curves: list[Curve]
    labels: list[str]
    """Of all curves of the report: each has its colour in every picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bullets:
    """A list."""

    items: list[str]


Block = str | Table | Picture | Bullets
"""A text is a paragraph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading and what follows it."""

    title: str
    blocks: list[Block]


def write_page(title: str, sections: Sequence[Section], output: Path) -> Path:
    """Write report.md, its pictures and report.html into `output`; returns the last."""
    output.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                draw(block, output / block.file)
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *map(_markdown, section.blocks)]
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    body = "\n".join(
        f"<h2>{html.escape(section.title)}</h2>\n"
        + "\n".join(_html(block, output) for block in section.blocks)
        for section in sections
    )
    page = output / "report.html"
    page.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
    return page


def _markdown(block: Block) -> str:
    match block:
        case Table():
            rows = [block.header, ["---"] * len(block.header), *block.rows]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
            )
        case Picture():
            return f"![{block.caption}]({block.file})"
        case Bullets():
            return "\n".join(f"* {item}" for item in block.items)
    return block


def _html(block: Block, folder: Path) -> str:
    match block:
        case Table():
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
            rows = "\n".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in block.rows
            )
            return (
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>\n{rows}\n</tbody></table></div>"
            )
        case Picture():
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            caption = html.escape(block.caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Bullets():
            return (
                "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>"
            )
    return f"<p>{html.escape(block)}</p>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ max-width: 1020px; margin: 32px auto; padding: 0 20px; color: #1b1f27; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 24px; letter-spacing: -0.01em; }}
h2 {{ font-size: 17px; margin: 30px 0 8px; }}
figure {{ margin: 14px 0; }}
img {{ display: block; width: 100%; }}
figcaption {{ color: #626b7a; font-size: 13px; }}
.scroll {{ overflow-x: auto; }}
table {{ width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e5ea; }}
th {{ color: #626b7a; font-weight: 600; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""

_LOG_FROM = 20
"""Positive values that span this factor are drawn on a logarithmic axis."""


def draw(picture: Picture, path: Path) -> None:
    """Draw lines and bands into a PNG of about 1200 x 600 pixels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - `mneme list` must not wait for it
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    figure = Figure(figsize=(9, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for curve in picture.curves:
        index = picture.labels.index(curve.label)
        color = COLORS[index % len(COLORS)]
        style = "-" if index < len(COLORS) else "--"
        axes.fill_between(curve.tokens, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(curve.tokens, curve.loss, style, color=color, linewidth=1.7, label=curve.label)
    values = [value for curve in picture.curves for value in (*curve.low, *curve.high)]
    if min(values) > 0 and max(values) / min(values) >= _LOG_FROM:
        axes.set_yscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel(picture.label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#eceef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bfca")
    axes.legend(frameon=False)
    figure.savefig(path)
