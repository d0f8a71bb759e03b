"""Rules of `data.*` that need no file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig, WeightChange
from data.rules import check_lanes, problems


def sources(**weights: int) -> dict[str, SourceConfig]:
    return {name: SourceConfig(path=name, weight=weight) for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DataConfig(sources=sources(a=1, b=0)), []),
        (DataConfig(packing="best_fit", lookahead=32, block_documents=8, window_blocks=4), []),
        (
            DataConfig(sources={"a": SourceConfig(path="a", held_out=1.0)}),
            [r"data\.sources\.a\.held_out=1\.0: .* below 1; for example 0\.01"],
        ),
        (DataConfig(sources=sources(a=0, b=0)), [r"data\.sources\.a\.weight=0: no source has"]),
        (DataConfig(sources=sources(a=-1, b=1)), [r"data\.sources\.a\.weight=-1: must not be neg"]),
        (DataConfig(lookahead=4), [r"data\.lookahead=4: .*; leave it out, or use .*=best_fit"]),
        (DataConfig(packing="best_fit", lookahead=1), [r"data\.lookahead=1: .* use 2 or more"]),
        (DataConfig(window_blocks=8), [r"data\.window_blocks=8: data\.block_documents=1 has no"]),
    ],
)
def test_values_that_do_not_fit(config: DataConfig, expected: list[str]) -> None:
    found = list(problems(config))
    assert len(found) == len(expected), found
    assert all(re.search(pattern, text) for text, pattern in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (((100, {"a": 2}), (200, {"a": 0, "b": 1})), []),
        (((100, {"c": 2}),), [r"data\.weight_schedule\[0\]\.weights\.c: .* use one of a, b"]),
        (((100, {}),), [r"data\.weight_schedule\[0\]\.weights=\{\}: changes nothing"]),
        (((100, {"a": 2}), (100, {"a": 1})), [r"\[1\]\.tokens=100: .* use more than 100"]),
        (((5, {"a": 0}),), [r"data\.weight_schedule\[0\]\.weights: leaves no source"]),
    ],
)
def test_schedules(changes: tuple[tuple[int, dict[str, int]], ...], expected: list[str]) -> None:
    schedule = tuple(WeightChange(tokens=t, weights=weights) for t, weights in changes)
    found = list(problems(DataConfig(sources=sources(a=1, b=0), weight_schedule=schedule)))
    assert len(found) == len(expected), found
    assert all(re.search(pattern, text) for text, pattern in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("batch", "size", "lanes", "expected"),
    [
        (16, 4, None, []),
        (16, 4, 8, []),
        (64, 1, 64, []),
        (10, 4, None, ["train.global_batch_size=10: .* use 8 or 12"]),
        (2, 4, None, ["train.global_batch_size=2: .* use 4$"]),
        (16, 4, 12, ["data.num_lanes=12: .* use 8 or 16"]),
        (16, 8, 4, [r"parallel.data_parallel_size\*data_replicate=8: .* use 4$"]),
        (12, 5, 5, ["data.num_lanes=5: must divide train.global_batch_size=12; use null, and"]),
        (
            12,
            3,
            8,
            [
                "data.num_lanes=8: .* use 6 or 12",
                r"data_parallel_size\*data_replicate=3: .* 2 or 4",
            ],
        ),
        (0, 1, None, ["must be at least 1"]),
        (4, 1, 0, ["data.num_lanes=0: must be at least 1"]),
    ],
)
def test_lanes(batch: int, size: int, lanes: int | None, expected: list[str]) -> None:
    found = check_lanes(batch, size, lanes)
    assert len(found) == len(expected)
    assert all(re.search(pattern, text) for text, pattern in zip(found, expected, strict=True))


def test_rules_need_neither_torch_nor_numpy() -> None:
    code = "import sys, data.rules; assert not {'torch', 'numpy'} & set(sys.modules)"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
