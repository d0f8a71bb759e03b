"""Sequences that are spread over ranks: the numbers of one rank that has them whole, in fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.config import ParallelConfig
from tests.harness import run_distributed
from tests.parity import test_image_layouts, test_layouts_dsa
from tests.parity.test_layouts_dsa import INDEXING, LOSSES, sparse_recipe
from tests.parity.test_layouts_hybrid import hybrid_recipe
from tests.parity.test_layouts_tensor import compare, layout, name_of, world_size
from train.config import RunConfig
from train.model.config import HyperConnectionConfig

Steps = list[dict[str, Any]]
Model = Callable[[Path], RunConfig]


def contiguous(**ranks: int) -> ParallelConfig:
    return replace(layout(**ranks), context_split="contiguous")


def test_latent_attention_memory_and_mtp(tiny_corpus: Path) -> None:
    compare(tiny_corpus, "mhc", layout(context=2, expert=2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("mhc", contiguous(context=2)),
        ("mhc", layout(context=4, expert=4)),
        ("mhc", layout(context=2, data=2, expert=2)),
        pytest.param(
            "mhc", contiguous(context=2, data_replicate=2, expert=2), marks=pytest.mark.exhaustive
        ),
        pytest.param("hc", layout(context=2), marks=pytest.mark.exhaustive),
        pytest.param("plain", contiguous(context=4), marks=pytest.mark.exhaustive),
        ("single_pass", layout(context=2)),
        pytest.param("no_query_rank", layout(context=2), marks=pytest.mark.exhaustive),
        pytest.param("hash", contiguous(context=2), marks=pytest.mark.exhaustive),
        ("dsa", layout(context=4)),
    ],
    ids=name_of,
)
def test_every_model_and_layout(tiny_corpus: Path, model: str, parallel: ParallelConfig) -> None:
    compare(tiny_corpus, model, parallel)


def hybrid(corpus: Path) -> RunConfig:
    """Window, CSA and HCA in all stages; hash routing first; single-pass mHC and V4's MTP."""
    config = hybrid_recipe(corpus, 1, 8)
    model = replace(
        config.model,
        residual="mhc_single_pass",
        hyper_connection=HyperConnectionConfig(read_out="gated"),
        moe=replace(config.model.moe, num_hash_layers=1),
        mtp_kind="v4",
    )
    return replace(config, model=model)


def sparse(corpus: Path) -> RunConfig:
    """All stages of DSA."""
    return sparse_recipe(corpus, 1, 1, 8)


def images(corpus: Path) -> RunConfig:
    """Pictures in one of the sequences."""
    return test_image_layouts.recipe(corpus, 1, 4)


def train_rank(rank: int, config: RunConfig) -> Steps:
    if config.model.vision is None:
        return test_layouts_dsa.train_rank(rank, config)
    return test_image_layouts.train_rank(rank, config)


@cache
def one_rank(corpus: Path, model: Model) -> Steps:
    [found] = run_distributed(train_rank, 1, model(corpus))
    steps: Steps = found
    return steps


def on(config: RunConfig, parallel: ParallelConfig) -> RunConfig:
    """In two microbatches."""
    data = parallel.data_parallel_size * parallel.data_replicate_parallel_size
    micro = config.train.global_batch_size // (2 * data)
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
            for case in [
                (hybrid, layout(context=2)),
                (images, layout(context=2)),
                (sparse, contiguous(context=2)),
                (sparse, layout(context=2, tensor=2)),
                (hybrid, contiguous(context=2, data=2, expert=4)),
                (hybrid, layout(tensor=2)),
                (hybrid, layout(context=2, tensor=2, expert=2)),
                (images, contiguous(context=2, tensor=2)),
            ]
        ),
        *(
            pytest.param(
                *case,
                marks=[pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)],
            )
            for case in [
                (sparse, layout(context=2, data=2, expert=2)),
                (sparse, layout(context=4, expert=2)),
                (hybrid, layout(context=4, expert=2)),
                (images, contiguous(context=2, data=2, expert=2)),
            ]
        ),
    ],
    ids=lambda case: name_of(case) if isinstance(case, ParallelConfig) else case.__name__,
)
def test_stages_and_images(tiny_corpus: Path, model: Model, parallel: ParallelConfig) -> None:
    config = on(model(tiny_corpus), parallel)
    found = run_distributed(train_rank, world_size(parallel), config, timeout=300.0)
    for ours, theirs in zip(found[0], one_rank(tiny_corpus, model), strict=True):
        for name in (*LOSSES, *(name for name in INDEXING if name in theirs)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        # A frozen model reports no load.
        assert ours.get("moe/load_cv") == theirs.get("moe/load_cv")
        for mine, other in zip(ours.get("bias", []), theirs.get("bias", []), strict=True):
            assert np.array_equal(mine, other)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("model", [sparse, hybrid])
def test_again_and_with_recomputation_the_same_bits(
    tiny_corpus: Path, model: Model, recompute: Any
) -> None:
    config = on(model(tiny_corpus), layout(context=2, expert=2))
    again = replace(config, train=replace(config.train, recompute=recompute))
    first, second = (
        run_distributed(train_rank, 2, run, timeout=300.0)[0] for run in (config, again)
    )
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for name in (*LOSSES, *(name for name in INDEXING if name in theirs)):
            assert ours[name] == theirs[name], name
        for name, value in theirs["parameters"].items():
            assert np.array_equal(ours["parameters"][name], value), name
