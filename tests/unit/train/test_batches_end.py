"""A run whose sources are used up: foreseen where the manifests tell, else named with its step."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from data.config import DataConfig
from data.lanes import NoDocumentsLeftError
from tests.unit.data.corpora import unique_tokens, write_corpus
from train.build import build
from train.checkpoint.state import Progress
from train.config import RunConfig, TrainConfig
from train.loop import open_batches
from train.training import Training


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """128 tokens, twice."""
    config = write_corpus(
        tmp_path, unique_tokens({"code": [16, 48, 64]}), sequence_length=16, num_lanes=2
    )
    return replace(config, sources={"code": replace(config.sources["code"], epochs=2)})


def test_the_step_at_which_a_lane_has_nothing_left_is_named(data: DataConfig) -> None:
    config = RunConfig(name="r", data=data, train=TrainConfig(steps=20, global_batch_size=2))
    training = Mock(spec=Training, config=config, data_rank=0, data_size=1, memory=None)
    training.num_lanes, training.vision = 2, None
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    seen: list[object] = []
    with pytest.raises(NoDocumentsLeftError) as caught:
        seen.extend(batches)
    assert 0 < len(seen) <= 8, "sixteen sequences in two lanes"
    assert str(caught.value).startswith(f"step {len(seen) + 1}: data.sources.code.epochs=2: lane")


def test_too_few_tokens_are_refused_before_training(data: DataConfig) -> None:
    config = RunConfig(name="r", data=data, train=TrainConfig(steps=9, global_batch_size=2))
    config = replace(config, model=replace(config.model, vocab_size=2**16))
    with pytest.raises(ValueError, match=r"epochs=2 x 128 tokens: 256 tokens at most, but .* 288"):
        build(config)
