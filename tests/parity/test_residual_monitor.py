"""Gains of the residual maps against their definition, token by token.

That they are the same numbers in every layout is compared with all others in `test_layouts_*`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.harness import run_distributed
from tests.parity.test_layouts import recipe
from tests.parity.test_layouts_pipeline import join
from train.checkpoint.state import Progress
from train.config import RunConfig
from train.loop import open_batches
from train.model.hyper_connection import _Site
from train.monitor.residual import gains
from train.step import train_step

Maps = list[NDArray[np.float64]]
"""By site: [tokens, n, n]."""


def train_rank(rank: int, config: RunConfig) -> list[tuple[dict[str, Any], Maps]]:
    """Records, and the maps that the monitor was given."""
    training = join(config)
    found = []
    take = _Site.take_captured
    seen: Maps = []

    def spy(site: _Site) -> tuple[torch.Tensor, torch.Tensor]:
        maps, square = take(site)
        seen.append(maps.numpy().astype(np.float64))
        return maps, square

    _Site.take_captured = spy  # type: ignore[assignment, method-assign]
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    for step, (_, batch, _) in enumerate(batches, start=1):
        seen.clear()
        found.append((train_step(training, batch, step), list(seen)))
    return found


def by_definition(maps: Maps) -> dict[str, float]:
    """The gains of the mHC paper, by loops over sites and tokens."""
    tokens = len(maps[0])
    composites = []
    for start in range(len(maps)):
        product = np.stack([np.eye(maps[0].shape[-1])] * tokens)
        for site in maps[start:]:
            product = np.stack([site[t] @ product[t] for t in range(tokens)])
        composites.append(product)

    def worst(group: Maps, axis: int) -> tuple[float, float]:
        sums = [np.abs([matrix.sum(axis) for matrix in site]) for site in group]
        return max(s.max(1).mean() for s in sums), min(s.min(1).mean() for s in sums)

    found: dict[str, float] = {}
    for name, axis in (("forward", 1), ("backward", 0)):
        found[f"mhc/gain_{name}_max"], found[f"mhc/gain_{name}_min"] = worst(maps, axis)
        largest, smallest = worst(composites, axis)
        found[f"mhc/composite_gain_{name}"] = largest
        found[f"mhc/composite_gain_{name}_min"] = smallest
        means = [composite.mean(0) for composite in composites]
        found[f"mhc/composite_of_mean_{name}"] = max(
            float(np.abs(m.sum(axis)).max()) for m in means
        )
    return found


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_gains_are_those_of_the_definition(residual: str, tiny_corpus: Path) -> None:
    config = recipe(tiny_corpus, residual, data=1, expert=1, micro=4)
    ((*steps,),) = run_distributed(train_rank, 1, config)
    for record, maps in steps:
        assert len(maps) == 2 * config.model.num_layers
        for name, value in by_definition(maps).items():
            assert record[name] == pytest.approx(value, rel=1e-9), name
    if residual == "hc":  # the maps move
        for (before, _), (after, _) in pairwise(steps):
            assert before["mhc/composite_gain_forward"] != after["mhc/composite_gain_forward"]


def test_a_doubly_stochastic_map_has_gain_one_and_no_error() -> None:
    permutation = torch.eye(4)[torch.tensor([2, 0, 3, 1])]
    maps = torch.stack([permutation, torch.full((4, 4), 0.25)])
    assert torch.equal(gains(maps), torch.tensor([[1.0, 1, 1, 1, 0]]).expand(2, 5))


def test_the_largest_row_is_not_the_largest_column() -> None:
    maps = torch.tensor([[[1.0, 2.0], [0.0, -5.0]]])
    assert gains(maps).tolist() == [[5.0, 3.0, 3.0, 1.0, 6.0]]
