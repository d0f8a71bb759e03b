"""Recomputation on sharded ranks: the numbers of one rank that keeps everything, in fp64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.harness import run_distributed
from tests.parity.test_layouts import ADAMW, one_rank, recipe, train_rank
from train.model.config import Recompute


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "free"), [("full", True), ("streams", False)])
def test_recomputation_changes_nothing(tiny_corpus: Path, kind: Recompute, free: bool) -> None:
    reference = one_rank(tiny_corpus, "mhc", ADAMW)
    config = recipe(tiny_corpus, "mhc", 2, 2, 2)
    config = replace(
        config,
        train=replace(config.train, recompute=kind),
        parallel=replace(config.parallel, reshard_after_forward=free),
    )
    found = run_distributed(train_rank, 2, config)[0]
    for ours, theirs in zip(found, reference, strict=True):
        for name in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["moe/load_cv"] == theirs["moe/load_cv"]
        for name, value in theirs["parameters"].items():
            assert np.abs(ours["parameters"][name] - value).max() <= 1e-10, name


@pytest.mark.slow
def test_in_bf16_the_same_bits(tiny_corpus: Path) -> None:
    """The modules that stay fp32 are gathered apart, and again for the repeated forward pass."""
    config = recipe(tiny_corpus, "mhc", 2, 2, 2)
    kinds: list[Recompute] = ["none", "full"]
    kept, repeated = (
        run_distributed(
            train_rank,
            2,
            replace(config, train=replace(config.train, recompute=kind, dtype="bf16")),
        )[0]
        for kind in kinds
    )
    for ours, theirs in zip(repeated, kept, strict=True):
        for name, value in theirs["parameters"].items():
            assert np.array_equal(ours["parameters"][name], value), name
