"""Random access: right documents across shards, and every damaged byte is reported."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data.config import FaultConfig
from data.faults import DamagedSampleError
from data.index import ShardIndex, index_path
from data.reader import SplitReader
from data.tars import CorruptShardError
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    """Twelve documents in several shards."""
    texts = unique_tokens({"code": [5, 300, 1, 40, 700, 3, 8, 90, 2, 500, 60, 7]})
    write_corpus(tmp_path, texts, sequence_length=8, max_shard_bytes=700)
    return texts


def open_code(tmp_path: Path, **faults: Any) -> SplitReader:
    return SplitReader(
        tmp_path / "code", source="code", split="train", faults=FaultConfig(**faults)
    )


@pytest.fixture(params=["", "file://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path, texts: Texts) -> Iterator[str]:
    """The corpus as a path, as a URL of a folder, and in fsspec's memory."""
    folder = f"{tmp_path}/code"
    if request.param == "memory://":
        memory = fsspec.filesystem("memory")
        memory.put(f"{folder}/", folder, recursive=True)
        yield f"memory://{folder}"
        memory.rm(folder, recursive=True)
    else:
        yield f"{request.param}{folder}"


def test_documents_across_shards(place: str, texts: Texts) -> None:
    reader = SplitReader(place, source="code", split="train")
    assert len(reader.manifest.shards) > 3
    assert len(reader) == 12
    for document in (11, 0, 5, 4, 11, 1, 10, 2, 9, 3, 8, 6, 7):
        expected = texts["code"][document]
        assert reader.num_tokens(document) == len(expected)
        np.testing.assert_array_equal(reader.read(document).tokens, expected)
        shard, key = reader.place(document)
        assert shard == f"{place}/train/{Path(shard).name}"
        assert key == f"code/{document:04d}"


def test_every_flipped_token_byte_is_reported(tmp_path: Path, texts: Texts) -> None:
    tar = tmp_path / "code/train/shard-000000.tar"
    raw = tar.read_bytes()
    at = raw.index(texts["code"][1].tobytes())
    for byte in (0, 299, 599):
        damaged = bytearray(raw)
        damaged[at + byte] ^= 1
        tar.write_bytes(damaged)
        reader = open_code(tmp_path)
        reader.stored_tokens(0)
        with pytest.raises(
            DamagedSampleError, match=rf"source code, shard {tar}, key code/0001: checksum, CRC-32"
        ):
            reader.stored_tokens(1)


def test_damaged_index_is_reported(tmp_path: Path, texts: Texts) -> None:
    """Whichever number of the index is wrong, no other bytes pass for the document's."""
    tar = tmp_path / "code/train/shard-000000.tar"
    offset = int(ShardIndex.open(tar).token_offset[0])
    raw = bytearray(index_path(tar).read_bytes())
    at = raw.index(offset.to_bytes(8, "little"))
    raw[at : at + 8] = (offset + 2).to_bytes(8, "little")
    index_path(tar).write_bytes(raw)
    with pytest.raises(DamagedSampleError, match="key code/0000: checksum"):
        open_code(tmp_path).stored_tokens(0)
    index_path(tar).write_bytes(raw[:-1])
    with pytest.raises(CorruptShardError, match=rf"{len(raw) - 1} bytes, but {len(raw)} were"):
        open_code(tmp_path, damaged="skip")


def test_truncation_is_reported_on_opening_and_while_open(tmp_path: Path, texts: Texts) -> None:
    reader = open_code(tmp_path)
    tar = tmp_path / "code/train" / reader.manifest.shards[-1].name
    reader.stored_tokens(11)
    os.truncate(tar, 1024)
    with pytest.raises(DamagedSampleError, match="key code/0011: truncated, 0 of 14 bytes"):
        reader.stored_tokens(11)
    with pytest.raises(CorruptShardError, match="has 1024 bytes, but"):
        open_code(tmp_path)
    patient = open_code(tmp_path, damaged="skip")
    assert len(patient) == 12
    with pytest.raises(DamagedSampleError, match="key code/0011: truncated, 0 of 14 bytes"):
        patient.stored_tokens(11)


def test_exchanged_shard_is_reported(tmp_path: Path, texts: Texts) -> None:
    first, second = (tmp_path / f"code/train/shard-00000{i}.tar" for i in (0, 1))
    for path in (first, index_path(first)):
        path.unlink()
    second.rename(first)
    index_path(second).rename(index_path(first))
    second.write_bytes(b"")
    with pytest.raises(
        CorruptShardError,
        match=r"shard-000000.tar.widx lists \d+ samples in \d+ bytes, but the man",
    ):
        open_code(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".widx"])
def test_missing_shard_names_the_file(tmp_path: Path, texts: Texts, suffix: str) -> None:
    path = tmp_path / f"code/train/shard-000001.tar{suffix}"
    path.unlink()
    with pytest.raises(ValueError, match=rf"data\.sources\.code\.path=.*{path}, which is missing"):
        open_code(tmp_path)


def test_a_missing_shard_may_be_skipped_but_not_its_index(tmp_path: Path, texts: Texts) -> None:
    path = tmp_path / "code/train/shard-000001.tar"
    path.unlink()
    reader = open_code(tmp_path, damaged="skip")
    gone = [d for d in range(12) if reader.place(d)[0] == str(path)]
    assert gone
    for document in gone:
        assert reader.num_tokens(document) == len(texts["code"][document])
        with pytest.raises(DamagedSampleError, match=rf"missing shard, {path} is gone"):
            reader.stored_tokens(document)
    index_path(path).unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar\.widx, which is missing"):
        open_code(tmp_path, damaged="skip")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_and_then_closed(
    tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    monkeypatch.setattr("data.storage._MAX_OPEN_FILES", 2)
    reader = open_code(tmp_path)
    assert open_files() == before  # the indexes of many shards may be mapped
    for document in range(12):
        np.testing.assert_array_equal(reader.stored_tokens(document), texts["code"][document])
    assert open_files() == before + 2
    del reader
    assert open_files() == before
