"""How the report of a study looks; what it says is tested with the study itself."""

import base64
import re
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from launch.compare import Curve
from launch.study_page import Bullets, Picture, Section, Table, write_page
from launch.study_report import band


def curve(label: str, low: float, high: float) -> Curve:
    middle = (low + high) / 2
    return Curve(label=label, tokens=[0, 10], loss=[middle] * 2, low=[low] * 2, high=[high] * 2)


def test_a_band_spans_the_seeds_as_far_as_all_of_them_go() -> None:
    short, long = ([8, 16], [1.0, 1.0]), ([8, 16, 24], [3.0, 3.0, 3.0])
    found = band("x", [long, short], smoothed=True)
    assert (found.tokens, found.loss) == ([8, 16], [2.0, 2.0])
    assert (found.low, found.high) == ([1.0, 1.0], [3.0, 3.0])


def test_the_html_needs_no_other_file_and_says_what_the_markdown_says(tmp_path: Path) -> None:
    picture = Picture(
        file="a.png", caption="A <picture>", label="y", labels=["x"], curves=[curve("x", 1, 2)]
    )
    sections = [
        Section(title="First <part>", blocks=["Text & more.", Bullets(items=["one", "two < 3"])]),
        Section(title="Second", blocks=[Table(header=["a|b"], rows=[["<c>"]]), picture]),
    ]
    page = write_page("A <title>", sections, tmp_path / "out")
    text = page.read_text()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == (page.parent / "a.png").read_bytes()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    for escaped in (
        "A &lt;title&gt;",
        "First &lt;part&gt;",
        "two &lt; 3",
        "&lt;c&gt;",
        "&amp; more",
    ):
        assert escaped in text
    markdown = (page.parent / "report.md").read_text()
    for line in (
        "# A <title>",
        "## First <part>",
        "* two < 3",
        "| a\\|b |",
        "![A <picture>](a.png)",
    ):
        assert line in markdown.splitlines()


def test_lines_and_bands_are_drawn_where_they_belong(tmp_path: Path) -> None:
    """The first arm's line lies above the second's; values far apart are on a logarithmic axis."""
    heights = {}
    for name, top in (("linear", 3.0), ("log", 1000.0)):
        curves = [curve("above", top, top), curve("middle", 2.0, 2.5), curve("below", 1.0, 1.0)]
        picture = Picture(
            file=f"{name}.png",
            caption="",
            label="y",
            labels=[c.label for c in curves],
            curves=curves,
        )
        page = write_page(name, [Section(title="", blocks=[picture])], tmp_path)
        pixels = np.round(imread(page.parent / f"{name}.png")[..., :3] * 255)
        rows = []
        for color in ((0x2A, 0x78, 0xD6), (0xEB, 0x68, 0x34), (0x1B, 0x9E, 0x77)):
            places = (pixels == color).all(-1)
            assert places.sum() > 500
            rows.append(int(np.argmax(places.sum(1))))
        assert rows == sorted(rows)
        heights[name] = (rows[2] - rows[1]) / (rows[2] - rows[0])
    # (2.25 - 1) / (3 - 1), and log 2.25 / log 1000.
    assert abs(heights["linear"] - 0.625) < 0.02
    assert abs(heights["log"] - np.log(2.25) / np.log(1000)) < 0.02
