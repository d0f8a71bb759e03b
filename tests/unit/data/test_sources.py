"""Which documents a source gives: held-out ones, limits, splits, URLs; what identifies a corpus."""

import hashlib
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.config import DataConfig, SourceConfig, WeightChange
from data.loader import build_loader
from data.sources import Source, fingerprint, open_sources, supply_problem, vocab_size
from tests.unit.data.corpora import unique_tokens, write_corpus

_NUMBER = 60


@pytest.fixture
def split(tmp_path: Path) -> DataConfig:
    """Sixty documents of `code` in each split."""
    return write_corpus(
        tmp_path,
        unique_tokens({"code": [3 + n % 5 for n in range(_NUMBER)]}),
        sequence_length=16,
        max_shard_bytes=4000,
    )


@pytest.fixture
def whole(split: DataConfig, tmp_path: Path) -> DataConfig:
    """The same documents in a folder without splits."""
    folder = tmp_path / "whole"
    shutil.copytree(tmp_path / "code/train", folder)
    return replace(split, sources={"code": SourceConfig(path=str(folder), held_out=0.2)})


def change(config: DataConfig, **source: Any) -> DataConfig:
    return replace(config, sources={"code": replace(config.sources["code"], **source)})


def open_one(config: DataConfig, split: str) -> Source:
    return open_sources(config, split=split)["code"]


def keys(config: DataConfig, split: str = "train") -> list[str]:
    source = open_one(config, split)
    return [source.place(document)[1] for document in range(len(source.documents))]


def test_held_out_documents_are_those_that_are_not_trained_on(whole: DataConfig) -> None:
    train, held = keys(whole), keys(whole, "validation")
    assert len(held) == 12
    assert sorted(train + held) == [f"code/{n:04d}" for n in range(_NUMBER)]
    # The same in every version, or a run that goes on would train on what was held out.
    assert held[:4] == ["code/0022", "code/0025", "code/0049", "code/0051"]


@pytest.mark.slow
def test_held_out_documents_depend_on_no_seed(whole: DataConfig) -> None:
    def tokens(split: str, seed: int) -> set[int]:
        loader = build_loader(
            whole, split=split, seed=seed, global_batch_size=4, data_rank=0, data_size=1
        )
        return {int(t) for batch, _ in islice(loader, 40) for t in batch.input_ids.flatten()}

    held = tokens("validation", 1)
    assert held == tokens("validation", 2)
    assert not held & (tokens("train", 1) | tokens("train", 2))


def test_limits_are_nested_and_leave_out_what_is_held_out(whole: DataConfig) -> None:
    few, more = (keys(change(whole, max_documents=n)) for n in (5, 20))
    assert (len(few), len(more)) == (5, 20)
    assert set(few) < set(more) < set(keys(whole))
    assert keys(change(whole, max_documents=5), "validation") == keys(whole, "validation")


def test_documents_are_what_their_place_says(whole: DataConfig) -> None:
    tokens = unique_tokens({"code": [3 + n % 5 for n in range(_NUMBER)]})["code"]
    for config in (whole, change(whole, max_documents=7)):
        source = open_one(config, "train")
        for document in range(len(source.documents)):
            number = int(source.place(document)[1].rpartition("/")[2])
            assert source.documents.read(document).tokens.tolist() == tokens[number].tolist()
            assert source.documents.num_tokens(document) == len(tokens[number])
            assert source.documents.spans(document) == ()


def test_limits_of_a_source_with_splits(split: DataConfig) -> None:
    assert len(keys(change(split, max_documents=7))) == 7
    assert len(keys(change(split, max_documents=7), "validation")) == _NUMBER


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            {"held_out": 0.1},
            r"data\.sources\.code\.held_out=0\.1: .* its own validation split; use nu",
        ),
        ({"max_documents": 61}, r"data\.sources\.code\.max_documents=61: there are 60 to train on"),
    ],
)
def test_what_a_source_with_splits_refuses(
    split: DataConfig, source: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        open_sources(change(split, **source), split="train")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            {"held_out": 0.001},
            r"held_out=0\.001: leaves 0 of 60 documents for validation and 60 for",
        ),
        ({"held_out": 0.999}, r"held_out=0\.999: leaves 60 of 60 documents for validation and 0"),
        ({"max_documents": 49}, r"max_documents=49: there are 48 to train on"),
    ],
)
def test_what_a_source_without_splits_refuses(
    whole: DataConfig, source: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        open_sources(change(whole, **source), split="train")


def test_sources_without_held_out_documents_are_not_evaluated(
    whole: DataConfig, split: DataConfig
) -> None:
    none = change(whole, held_out=None)
    assert len(keys(none)) == _NUMBER
    with pytest.raises(
        ValueError, match=r"data\.sources: none .* data\.sources\.code\.held_out=0\.01"
    ):
        open_sources(none, split="validation")
    both = replace(none, sources={"a": none.sources["code"], "b": split.sources["code"]})
    assert list(open_sources(both, split="validation")) == ["b"]
    off = replace(both, sources={"b": both.sources["b"], "c": replace(both.sources["b"], weight=0)})
    assert list(open_sources(off, split="validation")) == ["b"]


def test_urls_are_the_same_corpus(whole: DataConfig) -> None:
    path = whole.sources["code"].path
    memory = fsspec.filesystem("memory")
    memory.put(f"{path}/", path, recursive=True)
    try:
        for url in (f"file://{path}", f"memory://{path}"):
            remote = change(whole, path=url)
            assert keys(remote) == keys(whole)
            assert fingerprint(remote) == fingerprint(whole)
            assert vocab_size(remote) == 2**16
    finally:
        memory.rm(path, recursive=True)
    with pytest.raises(
        ValueError, match=rf"there is no memory://{path}/train/manifest.json; build"
    ):
        open_sources(change(whole, path=f"memory://{path}", held_out=None), split="train")


def test_fingerprint_notices_any_shard(whole: DataConfig, tmp_path: Path) -> None:
    before = fingerprint(whole)
    manifest = Path(whole.sources["code"].path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert fingerprint(whole) != before


def test_fingerprint_of_a_megatron_corpus(whole: DataConfig, tmp_path: Path) -> None:
    """The size of the tokens, which may be terabytes, and the hash of their index."""
    prefix = tmp_path / "indexed"
    prefix.with_suffix(".idx").write_bytes(b"index")
    prefix.with_suffix(".bin").write_bytes(b"12345678")
    config = replace(whole, sources={"code": SourceConfig(path=str(prefix))})
    tokenizer = hashlib.sha256(Path(whole.tokenizer).read_bytes()).hexdigest()
    item = f"code 8 {hashlib.sha256(b'index').hexdigest()}"
    assert fingerprint(config) == hashlib.sha256((tokenizer + item).encode()).hexdigest()


def test_too_few_tokens_are_foreseen(split: DataConfig) -> None:
    tokens = sum(3 + n % 5 for n in range(_NUMBER))
    limited = change(split, epochs=3)
    assert supply_problem(limited, 3 * tokens) is None
    assert supply_problem(split, 10**12) is None
    problem = supply_problem(limited, 3 * tokens + 1)
    assert problem is not None
    assert f"data.sources.code.epochs=3 x {tokens} tokens: {3 * tokens} tokens at most" in problem
    assert f"take {3 * tokens + 1}; use more epochs" in problem
    assert supply_problem(replace(limited, packing="best_fit"), 10**12) is None
    later = replace(
        limited,
        sources={**limited.sources, "more": replace(split.sources["code"], weight=0)},
        weight_schedule=(WeightChange(tokens=10, weights={"more": 1}),),
    )
    assert supply_problem(later, 10**12) is None
    assert supply_problem(replace(later, weight_schedule=()), 10**12) is not None
