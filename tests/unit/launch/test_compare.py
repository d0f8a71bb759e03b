import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from launch.compare import Curve, differences, draw_curves, run_labels, smooth

RECIPE: dict[str, object] = {
    "name": "tiny",
    "model": {"residual": "mhc", "engram": {"layers": [1], "num_heads": 4}},
    "train": {"steps": 60, "seed": 0},
}


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
