"""Sequences that are spread over ranks: the numbers of one rank that has them whole, in fp64."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.config import ContextSplit, ParallelConfig
from tests.harness import run_distributed
from tests.parity.test_layouts import recipe, train_rank
from train.config import RunConfig

LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")


def spread(
    config: RunConfig, context: int, split: ContextSplit, data: int = 1, expert: int = 1
) -> RunConfig:
    parallel = ParallelConfig(
        data_parallel_size=data,
        context_parallel_size=context,
        context_split=split,
        expert_parallel_size=expert,
    )
    return replace(config, parallel=parallel)


@cache
def one_rank(corpus: Path, residual: str) -> list[dict[str, Any]]:
    [found] = run_distributed(train_rank, 1, recipe(corpus, residual, 1, 1, 8))
    trace: list[dict[str, Any]] = found
    return trace


@pytest.mark.parametrize(
    ("residual", "context", "split", "data", "expert"),
    [
        ("mhc", 2, "zigzag", 1, 2),
        ("mhc", 2, "contiguous", 1, 1),
        ("mhc_single_pass", 2, "zigzag", 2, 2),
        ("hc", 2, "zigzag", 1, 1),
        ("plain", 4, "zigzag", 1, 4),
    ],
)
def test_a_spread_sequence_trains_as_a_whole_one(
    tiny_corpus: Path, residual: str, context: int, split: ContextSplit, data: int, expert: int
) -> None:
    reference = one_rank(tiny_corpus, residual)
    config = recipe(tiny_corpus, residual, data, expert, 2)
    config = spread(config, context, split, data, expert)
    found = run_distributed(train_rank, data * context, config)
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["moe/load_cv"] == theirs["moe/load_cv"]
        for mine, other in zip(ours["bias"], theirs["bias"], strict=True):
            assert np.array_equal(mine, other)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)
    assert found[0][1]["validation/loss"] == pytest.approx(
        reference[1]["validation/loss"], rel=1e-12
    )
