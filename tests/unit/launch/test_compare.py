import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from launch.compare import Curve, differences, draw_curves, run_labels, smooth, write_report

RECIPE: dict[str, object] = {
    "name": "tiny",
    "model": {"residual": "mhc", "engram": {"layers": [1], "num_heads": 4}},
    "train": {"steps": 60, "seed": 0},
}


def write_run(run_dir: Path, recipe: dict[str, object], loss: float) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_dir / "status.json").write_text('{"state": "done"}')
    rows: list[dict[str, float]] = [
        {"step": s, "tokens": 2000 * s, "loss_main": loss + 5 / s, "tokens_per_second": 1234.0}
        for s in range(1, 61)
    ]
    rows[-1]["validation/loss"] = loss + 0.25
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_a_report_says_what_differs_and_what_came_out(tmp_path: Path) -> None:
    other = {"name": "b", "model": {"residual": "mhc", "engram": None}, "train": RECIPE["train"]}
    runs = [write_run(tmp_path / "a|<b>", RECIPE, 2.0), write_run(tmp_path / "off", other, 3.0)]
    page = write_report(runs, tmp_path / "out" / "report")
    final = sum(5 / step for step in range(51, 61)) / 10
    text = (page.parent / "report.md").read_text()
    assert f"| a\\|<b> |  | done | 60 | 120,000 | {2 + final:.4f} | 2.2500 | 1,234 |" in text
    assert f"| off | model.engram=null | done | 60 | 120,000 | {3 + final:.4f} | 3.2500 |" in text
    assert "](loss.png)" in text


def test_the_html_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "a<b>", RECIPE, 2.0)], tmp_path / "report")
    text = page.read_text()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == (page.parent / "loss.png").read_bytes()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text


def test_each_curve_is_in_the_picture_in_its_colour(tmp_path: Path) -> None:
    curves = [
        Curve(label="line", tokens=[0, 10], loss=[1.0, 2.0], validation=[(10, 2.0)]),
        Curve(label="band", tokens=[0, 10], loss=[2.0, 1.0], low=[1.5, 0.5], high=[2.5, 1.5]),
    ]
    draw_curves(curves, tmp_path / "loss.png")
    picture = np.round(imread(tmp_path / "loss.png")[..., :3] * 255)
    for color in ((0x2A, 0x78, 0xD6), (0xEB, 0x68, 0x34)):
        assert (picture == color).all(-1).sum() > 500


def test_differences_are_the_shortest_overrides() -> None:
    other = {
        "name": "other",
        "model": {"residual": "hc", "engram": {"layers": [1, 2], "num_heads": 4}},
        "train": {"steps": 60},
        "data": {"sources": {"docs": {"path": "x" * 100}}},
    }
    assert list(differences(RECIPE, other)) == [
        "model.residual=hc",
        "model.engram.layers=[1,2]",
        "~train.seed",
        "data={sources:{docs:{path:" + "x" * 39 + "...",
    ]
    assert list(differences(RECIPE, RECIPE)) == []


def test_smoothing_is_an_unbiased_moving_average() -> None:
    assert smooth([4.0] * 300) == pytest.approx([4.0] * 300)
    short = [3.0, 1.0, 2.0]
    assert smooth(short) == short
    # 200 values: window 4, so the weights of y[t-k] are proportional to 0.6 ** k.
    values = np.random.default_rng(0).normal(size=200)
    weights = 0.6 ** np.arange(200)
    expected = [np.average(values[: t + 1][::-1], weights=weights[: t + 1]) for t in range(200)]
    assert smooth(values.tolist()) == pytest.approx(expected)


def test_smoothing_keeps_gaps_where_they_are() -> None:
    values = [1.0] * 200
    values[100] = math.nan
    smoothed = smooth(values)
    assert math.isnan(smoothed[100])
    assert smoothed[:100] + smoothed[101:] == pytest.approx([1.0] * 199)


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert run_labels([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert run_labels([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match=r"no records in metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"no readable recipe\.yaml"):
        write_report([tmp_path], tmp_path / "report")
