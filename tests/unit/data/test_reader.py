"""Random access: right documents across shards, and every damaged byte is reported."""

import os
from pathlib import Path

import numpy as np
import pytest

from data.index import index_path
from data.reader import SplitReader
from data.tars import CorruptShardError
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    """Twelve documents in several shards."""
    texts = unique_tokens({"code": [5, 300, 1, 40, 700, 3, 8, 90, 2, 500, 60, 7]})
    write_corpus(tmp_path, texts, sequence_length=8, max_shard_bytes=700)
    return texts


def open_code(tmp_path: Path) -> SplitReader:
    return SplitReader(tmp_path / "code", source="code", split="train")


def test_documents_across_shards(tmp_path: Path, texts: Texts) -> None:
    reader = open_code(tmp_path)
    assert len(reader.manifest.shards) > 3
    assert len(reader) == 12
    for document in (11, 0, 5, 4, 11, 1, 10, 2, 9, 3, 8, 6, 7):
        expected = texts["code"][document]
        assert reader.num_tokens(document) == len(expected)
        np.testing.assert_array_equal(reader.tokens(document), expected)


def test_every_flipped_token_byte_is_reported(tmp_path: Path, texts: Texts) -> None:
    tar = tmp_path / "code/train/shard-000000.tar"
    raw = tar.read_bytes()
    at = raw.index(texts["code"][1].tobytes())
    for byte in (0, 299, 599):
        damaged = bytearray(raw)
        damaged[at + byte] ^= 1
        tar.write_bytes(damaged)
        reader = open_code(tmp_path)
        reader.tokens(0)
        with pytest.raises(CorruptShardError, match=rf"source code, shard {tar}, key code/0001:"):
            reader.tokens(1)


def test_damaged_index_is_reported(tmp_path: Path, texts: Texts) -> None:
    """Whichever number of the index is wrong, no other bytes pass for the document's."""
    sidecar = index_path(tmp_path / "code/train/shard-000000.tar")
    raw = bytearray(sidecar.read_bytes())
    reader = open_code(tmp_path)
    offset = int(reader._indexes[0].offset[2])
    at = raw.index(offset.to_bytes(8, "little"))
    raw[at : at + 8] = (offset + 2).to_bytes(8, "little")
    sidecar.write_bytes(raw)
    with pytest.raises(CorruptShardError, match="key code/0000"):
        open_code(tmp_path).tokens(0)


def test_truncation_is_reported_on_opening_and_while_open(tmp_path: Path, texts: Texts) -> None:
    reader = open_code(tmp_path)
    tar = tmp_path / "code/train" / reader.manifest.shards[-1].name
    reader.tokens(11)
    os.truncate(tar, 1024)
    with pytest.raises(CorruptShardError, match="key code/0011: 0 bytes"):
        reader.tokens(11)
    with pytest.raises(CorruptShardError, match="1024 bytes, but"):
        open_code(tmp_path)


def test_exchanged_shard_is_reported(tmp_path: Path, texts: Texts) -> None:
    first, second = (tmp_path / f"code/train/shard-00000{i}.tar" for i in (0, 1))
    for path in (first, index_path(first)):
        path.unlink()
    second.rename(first)
    index_path(second).rename(index_path(first))
    second.write_bytes(b"")
    with pytest.raises(CorruptShardError, match=r"shard-000000.tar has \d+ samples in \d+ bytes"):
        open_code(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".widx"])
def test_missing_shard_names_the_file(tmp_path: Path, texts: Texts, suffix: str) -> None:
    path = tmp_path / f"code/train/shard-000001.tar{suffix}"
    path.unlink()
    with pytest.raises(ValueError, match=rf"data\.sources\.code\.path=.*{path}, which is missing"):
        open_code(tmp_path)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_files_are_closed(tmp_path: Path, texts: Texts) -> None:
    before = open_files()
    reader = open_code(tmp_path)
    for document in range(12):
        reader.tokens(document)
    assert open_files() > before
    del reader
    assert open_files() == before
