"""The stream with pictures: the same for every number of workers and ranks, depth and interruption."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.loader import build_loader
from data.packing import Batch, join
from tests.unit.data.albums import MARKER, VISION, some_documents, write_album

LANES = 4
State = dict[str, str]


@pytest.fixture(scope="module")
def album() -> Iterator[DataConfig]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_album(Path(folder), some_documents(14), num_lanes=LANES)


def global_batches(
    config: DataConfig, data_size: int, steps: int, state: State | None, per_lane: int = 1
) -> tuple[list[Batch], State]:
    """What the ranks see together, and their united state."""
    parts, merged = [], dict(state or {})
    for rank in range(data_size):
        loader = build_loader(
            config,
            split="train",
            seed=5,
            global_batch_size=LANES * per_lane,
            data_rank=rank,
            data_size=data_size,
            state=state,
            vision=VISION,
        )
        items = list(islice(loader, steps))
        parts.append([batch for batch, _ in items])
        merged |= items[-1][1]
    return [join(step) for step in zip(*parts, strict=True)], merged


def tensors(batch: Batch) -> dict[str, Any]:
    assert batch.vision is not None
    fields = vars(batch) | vars(batch.vision)
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def assert_same(mine: list[Batch], theirs: list[Batch]) -> None:
    for batch, other in zip(mine, theirs, strict=True):
        assert (batch.source_tokens, batch.faults) == (other.source_tokens, other.faults)
        expected = tensors(other)
        assert len(expected) == 8
        for name, value in tensors(batch).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("packing", ["concat_split", "best_fit"])
def test_workers_change_nothing(album: DataConfig, packing: Any) -> None:
    config = replace(album, packing=packing)
    expected, last = global_batches(config, 1, 6, None)
    assert any(tensors(batch)["grids"].numel() for batch in expected)
    for workers, depth, size in ((1, 1, 1), (3, 2, 2)):
        changed = replace(config, num_workers=workers, prefetch_batches=depth)
        batches, state = global_batches(changed, size, 6, None)
        assert_same(batches, expected)
        assert state == last


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_stop_anywhere_and_go_on_with_any_workers_depth_and_ranks(data: st.DataObject) -> None:
    """Workers 0 to 3."""
    steps, per_lane = 7, data.draw(st.sampled_from([1, 2]))
    with tempfile.TemporaryDirectory() as folder:
        config = write_album(
            Path(folder),
            some_documents(data.draw(st.integers(1, 14))),
            num_lanes=LANES,
            packing=data.draw(st.sampled_from(["concat_split", "best_fit"])),
            prefetch_batches=0,
        )
        expected, last = global_batches(config, 1, steps, None, per_lane)
        got: list[Batch] = []
        state: State | None = None
        while len(got) < steps:
            changed = replace(
                config,
                num_workers=data.draw(st.integers(0, 3)),
                prefetch_batches=data.draw(st.integers(0, 3)),
            )
            run = data.draw(st.integers(1, steps - len(got)))
            size = data.draw(st.sampled_from([1, 2, 4]))
            batches, state = global_batches(changed, size, run, state, per_lane)
            got += batches
    assert state == last
    assert_same(got, expected)
    for batch in expected:
        assert batch.vision is not None
        rows = batch.vision.patches_per_sequence() // VISION.spatial_merge**2
        assert torch.equal(rows, (batch.input_ids == MARKER).sum(1))
