"""Sidecar index: agrees with tarfile, and notices what stock readers pass over."""

import io
import os
import tarfile
import time
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import ShardIndex, index_path
from data.indexing import build_index
from data.tars import CorruptShardError, split_name

BLOCK = 512


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int) -> None:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))


def shard(tmp_path: Path, samples: int = 5) -> Path:
    path = tmp_path / "shard-000000.tar"
    members = [
        (f"a/{i}.{extension}", payload)
        for i in range(samples)
        for extension, payload in (("json", b"{}"), ("txt", b"x" * 700), ("u16", b"ab" * (i + 1)))
    ]
    write_tar(path, members, tarfile.USTAR_FORMAT)
    return path


names = st.text("abc./-_", min_size=1, max_size=150).filter(
    lambda name: (
        "//" not in name and name[0] != "/" and name[-1] != "/" and split_name(name)[0] == name
    )
)


@settings(deadline=None, max_examples=40)
@given(
    keys=st.lists(names, min_size=1, max_size=8, unique=True),
    payloads=st.lists(st.binary(max_size=1500), min_size=8, max_size=8),
    tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_index_is_what_tarfile_lists(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[str],
    payloads: list[bytes],
    tar_format: int,
) -> None:
    """Long names included, which the two formats store in members of their own."""
    path = tmp_path_factory.mktemp("tar") / "shard-000000.tar"
    members = []
    for key, payload in zip(keys, payloads, strict=False):
        members += [(f"{key}.txt", payload), (f"{key}.u32", b"1234" + payload[:4].ljust(4))]
    write_tar(path, members, tar_format)
    build_index(path).write(path)
    index = ShardIndex.open(path)
    raw = path.read_bytes()
    assert [index.key(i) for i in range(len(index))] == keys
    assert index.num_tokens.tolist() == [2] * len(keys)
    assert index.token_dtype == np.dtype("<u4")
    for i, (name, payload) in enumerate(members):
        offset, size = int(index.offset[i]), int(index.size[i])
        assert index.member_name(i) == name
        assert raw[offset : offset + size] == payload
        assert index.crc32[i] == zlib.crc32(payload)


def test_written_index_reads_back_the_same(tmp_path: Path) -> None:
    path = shard(tmp_path)
    built = build_index(path)
    built.write(path)
    opened = ShardIndex.open(path)
    for field in fields(ShardIndex):
        np.testing.assert_array_equal(getattr(opened, field.name), getattr(built, field.name))
    assert opened.num_tokens.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, BLOCK, 3 * BLOCK, 10 * BLOCK + 7])
def test_truncated_tar_is_refused(tmp_path: Path, cut: int) -> None:
    """At the end, between members and inside one; tarfile itself is silent about most of these."""
    path = shard(tmp_path)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 2 * BLOCK - cut])
    with pytest.raises(CorruptShardError, match=str(path)):
        build_index(path)


def test_damaged_header_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path)
    with tarfile.open(path) as archive:
        header = archive.getmember("a/2.txt").offset
    raw = bytearray(path.read_bytes())
    raw[header : header + BLOCK] = bytes([255]) * BLOCK
    path.write_bytes(raw)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 7  # the trap: seven of fifteen members, and no error
    with pytest.raises(CorruptShardError, match="damaged or cut short after a/2"):
        build_index(path)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("a.txt", b"x")], "one member of token ids"),
        ([("a.u16", b"")], "not empty"),
        ([("a.u16", b"xx"), ("b.u16", b"xx"), ("a.txt", b"x")], "comes twice"),
        ([("a.u16", b"xx"), ("b.u32", b"xxxx")], "all u16 or all u32"),
    ],
)
def test_unusable_samples_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], problem: str
) -> None:
    path = tmp_path / "shard-000000.tar"
    write_tar(path, members, tarfile.USTAR_FORMAT)
    with pytest.raises(CorruptShardError, match=problem):
        build_index(path)


def test_changed_sizes_are_noticed_on_opening(tmp_path: Path) -> None:
    path = shard(tmp_path)
    build_index(path).write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptShardError, match=f"{len(whole) - 1} bytes, but {len(whole)}"):
        ShardIndex.open(path)
    path.write_bytes(whole)
    sidecar = index_path(path)
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match="widx"):
        ShardIndex.open(path)
    sidecar.write_bytes(b"MNEMEIX1" + bytes(100))
    with pytest.raises(
        CorruptShardError, match=r"version 1, not 2; build the corpus again with `mn"
    ):
        ShardIndex.open(path)
    sidecar.write_bytes(b"not an index")
    with pytest.raises(CorruptShardError, match="not a shard index"):
        ShardIndex.open(path)


def test_opening_reads_the_header_alone(tmp_path: Path) -> None:
    """An index of a hundred million samples: 3.6 GB of holes, which would take seconds to read."""
    path = shard(tmp_path)
    build_index(path).write(path)
    sidecar = index_path(path)
    samples, sample_bytes, place = 10**8, 4 * 8 + 4, 8 + 4 * 8
    raw = bytearray(sidecar.read_bytes())
    assert raw[place] == 5
    raw[place : place + 8] = samples.to_bytes(8, "little")
    sidecar.write_bytes(raw)
    os.truncate(sidecar, len(raw) + (samples - 5) * sample_bytes)
    started = time.perf_counter()
    index = ShardIndex.open(path)
    assert time.perf_counter() - started < 0.5
    assert len(index) == samples
    assert index.num_tokens[samples - 1] == 0
