"""The loader: arguments, splits, the prefetching thread and its end."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from data.config import DataConfig, SourceConfig
from data.faults import DamagedSampleError
from data.loader import Batch, build_loader, fingerprint, vocab_size
from data.prefetch import _stop
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus

Load = Callable[..., Iterator[tuple[Batch, dict[str, str]]]]


@pytest.fixture
def texts() -> Texts:
    """Two sources."""
    return unique_tokens({"code": [30, 5, 60, 8, 17], "docs": [12, 44, 3]})


@pytest.fixture
def config(tmp_path: Path, texts: Texts) -> DataConfig:
    """A corpus on disk."""
    return write_corpus(tmp_path, texts, sequence_length=16)


def load(config: DataConfig, **changes: Any) -> Iterator[tuple[Batch, dict[str, str]]]:
    arguments = {
        "split": "train",
        "seed": 0,
        "global_batch_size": 4,
        "data_rank": 0,
        "data_size": 1,
        **changes,
    }
    return build_loader(config, **arguments)


def first(batches: Iterator[tuple[Batch, dict[str, str]]], number: int) -> list[list[list[int]]]:
    return [batch.input_ids.tolist() for batch, _ in islice(batches, number)]


def test_shapes_and_types(config: DataConfig) -> None:
    batch, state = next(load(config, data_rank=1, data_size=2))
    for field in (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids):
        assert field.shape == (2, 16)
        assert field.dtype == torch.int64
    assert list(state) == ["order", "lane/000002", "lane/000003"]


def test_each_loader_starts_from_the_beginning(config: DataConfig) -> None:
    held_out = first(load(config, split="validation"), 5)
    assert first(load(config, split="validation"), 5) == held_out
    assert first(load(config), 5) != held_out
    assert first(load(config, seed=1), 5) != first(load(config), 5)


def test_lanes_give_neighbouring_sequences(config: DataConfig) -> None:
    """With one lane the sequences of a batch follow each other in one stream."""
    one = replace(config, num_lanes=1)
    rows = [row for batch in first(load(one), 3) for row in batch]
    assert rows == [row for batch in first(load(one, global_batch_size=1), 12) for row in batch]


@pytest.mark.parametrize(
    ("changes", "arguments", "problem"),
    [
        ({}, {"global_batch_size": 6, "data_size": 4}, r"train\.global_batch_size=6: must be"),
        ({"num_lanes": 3}, {}, r"data\.num_lanes=3: must divide train\.global_batch_size=4; use"),
        ({}, {"split": "test"}, "split=test: use one of train, validation"),
        ({"sequence_length": 0}, {}, r"data\.sequence_length=0: use 1"),
        ({"prefetch_batches": -1}, {}, r"data\.prefetch_batches=-1: use 0"),
        ({"sources": {}}, {}, r"data\.sources=\{\}: needs a source"),
        ({"tokenizer": "no/such.json"}, {}, r"data\.tokenizer=no/such.json: there is no /.*build"),
        ({}, {"state": {"order": ""}}, "lane/000000: the saved data position has 1 items"),
        ({"lookahead": 3}, {}, r"data\.lookahead=3: data\.packing=concat_split takes"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    config: DataConfig, changes: dict[str, Any], arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        load(replace(config, **changes), **arguments)


def test_missing_corpus_says_what_to_type(config: DataConfig, tmp_path: Path) -> None:
    sources = {"code": SourceConfig(path=str(tmp_path / "nowhere"))}
    problem = (
        rf"data\.sources\.code\.path={tmp_path}/nowhere: there is no "
        rf"{tmp_path}/nowhere/train/manifest.json; build it with `mneme data build quickstart`"
    )
    with pytest.raises(ValueError, match=problem):
        load(replace(config, sources=sources))


def test_another_tokenizer_is_refused(config: DataConfig) -> None:
    assert vocab_size(config) == 2**16
    before = fingerprint(config)
    Path(config.tokenizer).write_text('{"other": 1}')
    with pytest.raises(ValueError, match="holds token ids of another tokenizer"):
        load(config)
    assert fingerprint(config) != before


def test_order_of_sources_in_the_recipe_does_not_matter(config: DataConfig) -> None:
    reversed_config = replace(config, sources=dict(reversed(config.sources.items())))
    assert first(load(reversed_config), 4) == first(load(config), 4)
    assert fingerprint(reversed_config) == fingerprint(config)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetching_changes_nothing(config: DataConfig, depth: int) -> None:
    ahead = list(islice(load(replace(config, prefetch_batches=depth)), 9))
    for (batch, state), (other, other_state) in zip(ahead, load(config), strict=False):
        assert torch.equal(batch.labels, other.labels)
        assert state == other_state


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-loader"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_thread_ends_with_the_loader(config: DataConfig) -> None:
    loader = load(replace(config, prefetch_batches=2))
    next(loader)
    assert len(loader_threads()) == 1
    del loader
    gc.collect()
    assert not loader_threads()


def test_collection_in_the_thread_itself_does_not_wait_for_itself() -> None:
    """Garbage is collected in whichever thread allocates next."""
    stop = threading.Event()
    _stop(threading.current_thread(), stop, Queue(1))
    assert stop.is_set()


def test_error_in_the_thread_reaches_the_consumer_again_and_again(
    config: DataConfig, texts: Texts
) -> None:
    tar = Path(config.sources["docs"].path) / "train/shard-000000.tar"
    raw = bytearray(tar.read_bytes())
    raw[raw.index(texts["docs"][1].tobytes())] ^= 1
    tar.write_bytes(raw)
    loader = load(replace(config, prefetch_batches=2))
    with pytest.raises(DamagedSampleError, match=f"source docs, shard {tar}, key docs/0001"):
        list(loader)
    with pytest.raises(DamagedSampleError, match="key docs/0001"):
        next(loader)
    wait_for(lambda: not loader_threads())


@pytest.mark.parametrize("ending", ["", "del loader"])
def test_process_exits_while_the_thread_is_full(config: DataConfig, ending: str) -> None:
    source = {name: s.path for name, s in config.sources.items()}
    code = f"""
        from data.config import DataConfig, SourceConfig
        from data.loader import build_loader
        config = DataConfig(
            sources={{n: SourceConfig(path=p) for n, p in {source!r}.items()}},
            tokenizer={config.tokenizer!r}, sequence_length=16, prefetch_batches=2,
        )
        loader = build_loader(
            config, split="train", seed=0, global_batch_size=4, data_rank=0, data_size=1
        )
        next(loader)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
