"""Where the tokens of a batch came from, against the batches themselves."""

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, FaultConfig
from data.loader import build_loader
from data.locate import BatchShape, Place, locate
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus

_SHAPES = [
    BatchShape(steps=range(1, 6), sequence_length=16, global_batch_size=8),
    BatchShape(steps=range(6, 20), sequence_length=11, global_batch_size=4),
]


@pytest.fixture
def texts() -> Texts:
    """Two sources."""
    return unique_tokens({"code": [30, 5, 60, 8, 17], "docs": [12, 44, 3]})


@pytest.fixture
def config(tmp_path: Path, texts: Texts) -> DataConfig:
    """A corpus in several shards."""
    return write_corpus(tmp_path, texts, sequence_length=16, num_lanes=4, max_shard_bytes=700)


def batches(config: DataConfig) -> tuple[list[list[list[int]]], list[dict[str, str]]]:
    """Token ids of every step and the state after it, as training sees them."""
    rows: list[list[list[int]]] = []
    states: list[dict[str, str]] = []
    for shape in _SHAPES:
        loader = build_loader(
            replace(config, sequence_length=shape.sequence_length),
            split="train",
            seed=5,
            global_batch_size=shape.global_batch_size,
            data_rank=0,
            data_size=1,
            state=states[-1] if states else None,
        )
        for batch, state in islice(loader, len(shape.steps)):
            rows.append(batch.input_ids.tolist())
            states.append(state)
    return rows, states


def find(config: DataConfig, step: int, sample: int | None = None, **options: Any) -> list[Place]:
    return locate(
        config,
        **{"seed": 5, "num_lanes": 4, "shapes": _SHAPES, **options},
        step=step,
        sample=sample,
    )


def tokens(places: list[Place], texts: Texts) -> list[int]:
    """By the keys of `write_corpus`."""
    found = []
    for place in places:
        name, _, number = place.key.partition("/")
        assert place.source == name
        found += texts[name][int(number)][place.start : place.stop].tolist()
    return found


def test_every_batch_is_found_from_the_start_and_from_a_saved_position(
    config: DataConfig, texts: Texts
) -> None:
    rows, states = batches(config)
    for step in (1, 4, 6, 11):
        assert tokens(find(config, step), texts) == list(chain(*rows[step - 1]))
        row = rows[step - 1][3]
        assert tokens(find(config, step, 3), texts) == row
    late = [
        BatchShape(steps=range(8, 20), sequence_length=11, global_batch_size=4),
    ]
    assert tokens(find(config, 11, shapes=late, state=states[6]), texts) == list(chain(*rows[10]))


def test_skipped_samples_are_found_missing(config: DataConfig, texts: Texts) -> None:
    tar = Path(config.sources["code"].path) / "train/shard-000000.tar"
    raw = bytearray(tar.read_bytes())
    raw[raw.index(texts["code"][1].tobytes())] ^= 1
    tar.write_bytes(raw)
    patient = replace(config, faults=FaultConfig(damaged="skip", max_skipped_fraction=1.0))
    rows, _ = batches(patient)
    assert tokens(find(patient, 4), texts) == list(chain(*rows[3]))


def test_no_document_is_read(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr("os.pread", refuse)
    [place, *_] = find(config, 7, 2)
    assert place.lane == 2
    assert Path(place.shard).is_file()


@pytest.mark.parametrize(
    ("step", "sample", "problem"),
    [(0, 0, "--step 0: .* 1 to 5, 6 to 19"), (20, 0, "--step 20"), (7, 4, "use 0 to 3")],
)
def test_what_is_not_there(config: DataConfig, step: int, sample: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        find(config, step, sample)
