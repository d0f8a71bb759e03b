"""Sequences that are spread over ranks: the numbers of one rank that has them whole, in fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.config import ContextSplit, ParallelConfig
from tests.harness import run_distributed
from tests.parity import test_image_layouts, test_layouts, test_layouts_dsa
from tests.parity.test_layouts_dsa import INDEXING, sparse_recipe
from tests.parity.test_layouts_hybrid import hybrid_recipe
from train.config import RunConfig
from train.model.config import HyperConnectionConfig

LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")
SLOW = pytest.mark.slow
Steps = list[dict[str, Any]]


def dense(corpus: Path, residual: str) -> RunConfig:
    """Latent attention, memory (with its convolution, but for `mhc_single_pass`), MTP."""
    return test_layouts.recipe(corpus, residual, 1, 1, 8)


def hybrid(corpus: Path, _: str) -> RunConfig:
    """Window, CSA and HCA; hash routing in the first layer; both single-pass mHC and V4's MTP."""
    config = hybrid_recipe(corpus, 1, 8)
    model = replace(
        config.model,
        residual="mhc_single_pass",
        hyper_connection=HyperConnectionConfig(read_out="gated"),
        moe=replace(config.model.moe, num_hash_layers=1),
        mtp_kind="v4",
    )
    return replace(config, model=model)


def sparse(corpus: Path, _: str) -> RunConfig:
    """All stages of DSA."""
    return sparse_recipe(corpus, 1, 1, 8)


def images(corpus: Path, _: str) -> RunConfig:
    """Pictures in one of the sequences, across ranks."""
    return test_image_layouts.recipe(corpus, 1, 4)


Model = Callable[[Path, str], RunConfig]
TRAIN_RANK: dict[Model, Callable[[int, RunConfig], Steps]] = {
    dense: test_layouts.train_rank,
    hybrid: test_layouts_dsa.train_rank,
    sparse: test_layouts_dsa.train_rank,
    images: test_image_layouts.train_rank,
}


def spread(
    config: RunConfig, context: int, split: ContextSplit, data: int, expert: int, copies: int
) -> RunConfig:
    parallel = ParallelConfig(
        data_parallel_size=data,
        data_replicate_parallel_size=copies,
        context_parallel_size=context,
        context_split=split,
        expert_parallel_size=expert,
    )
    micro = config.train.global_batch_size // (2 * data * copies)
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))


@cache
def one_rank(corpus: Path, model: Model, residual: str) -> Steps:
    [found] = run_distributed(TRAIN_RANK[model], 1, model(corpus, residual))
    steps: Steps = found
    return steps


def assert_same_training(found: Steps, reference: Steps) -> None:
    for ours, theirs in zip(found, reference, strict=True):
        for name in (*LOSSES, *(name for name in INDEXING if name in theirs)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        # A frozen model reports no load.
        assert ours.get("moe/load_cv") == theirs.get("moe/load_cv")
        for mine, other in zip(ours.get("bias", []), theirs.get("bias", []), strict=True):
            assert np.array_equal(mine, other)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)
        if "validation/loss" in theirs:
            expected = pytest.approx(theirs["validation/loss"], rel=1e-12)
            assert ours["validation/loss"] == expected


@pytest.mark.parametrize(
    ("model", "residual", "context", "split", "data", "expert", "copies"),
    [
        (dense, "mhc", 2, "zigzag", 1, 2, 1),
        (sparse, "", 2, "contiguous", 1, 1, 1),
        (hybrid, "", 2, "zigzag", 1, 1, 1),
        (images, "", 2, "zigzag", 1, 1, 1),
        pytest.param(dense, "mhc", 2, "contiguous", 2, 1, 1, marks=SLOW),
        pytest.param(dense, "mhc", 2, "zigzag", 1, 2, 2, marks=SLOW),
        pytest.param(dense, "mhc_single_pass", 2, "zigzag", 2, 2, 1, marks=SLOW),
        pytest.param(dense, "hc", 2, "zigzag", 1, 1, 1, marks=SLOW),
        pytest.param(dense, "plain", 4, "zigzag", 1, 4, 1, marks=SLOW),
        pytest.param(sparse, "", 2, "zigzag", 2, 2, 1, marks=SLOW),
        pytest.param(sparse, "", 4, "zigzag", 1, 2, 1, marks=SLOW),
        pytest.param(hybrid, "", 2, "contiguous", 2, 4, 1, marks=SLOW),
        pytest.param(hybrid, "", 4, "zigzag", 1, 2, 1, marks=SLOW),
        pytest.param(images, "", 2, "contiguous", 2, 2, 1, marks=SLOW),
    ],
)
def test_spread_sequences_train_as_whole_ones(
    tiny_corpus: Path,
    model: Model,
    residual: str,
    context: int,
    split: ContextSplit,
    data: int,
    expert: int,
    copies: int,
) -> None:
    reference = one_rank(tiny_corpus, model, residual)
    config = spread(model(tiny_corpus, residual), context, split, data, expert, copies)
    ranks = context * data * copies
    found = run_distributed(TRAIN_RANK[model], ranks, config, timeout=200.0)
    assert_same_training(found[0], reference)


@pytest.mark.slow
@pytest.mark.parametrize("model", [dense, sparse, hybrid])
def test_a_repeated_run_has_the_same_bits(tiny_corpus: Path, model: Model) -> None:
    config = spread(model(tiny_corpus, "mhc"), 2, "zigzag", 1, 2, 1)
    once, again = (run_distributed(TRAIN_RANK[model], 2, config)[0] for _ in range(2))
    for ours, theirs in zip(once, again, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == theirs["loss"]
        for name, value in theirs["parameters"].items():
            assert np.array_equal(ours["parameters"][name], value), name
