"""Counts of a corpus, against the documents that were written and numpy's percentiles."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards import Sample, SampleMedium, write_split
from data.stats import (
    PERCENTILES,
    _histogram,
    _joined,
    _quantiles,
    format_stats,
    plain_stats,
    stats,
)
from data.tars import CorruptShardError

MARKER = 2


def write(folder: Path, source: str, split: str, lengths: list[int], clips: int = 0) -> None:
    medium = SampleMedium(
        extension="mp4", payload=b"x", kind="video", width=4, height=3, frames=5, fps=2.0
    )
    samples = [
        Sample(
            key=str(i),
            metadata={"seq": [medium.part(0)]} if i < clips else {},
            text="t",
            tokens=np.array([MARKER if i < clips else 3] + [3] * (length - 1), np.uint16),
            media=(medium,) if i < clips else (),
        )
        for i, length in enumerate(lengths)
    ]
    write_split(
        folder,
        samples,
        source=source,
        split=split,
        tokenizer_sha256="",
        vocab_size=9,
        media_token_id=MARKER,
        max_shard_bytes=200,
    )


def test_counts_per_source_and_split(tmp_path: Path) -> None:
    lengths = {"train": [1, 5, 300, 7000], "validation": [20, 4]}
    for split, documents in lengths.items():
        write(tmp_path / "books" / split, "books", split, documents, clips=2)
    write(tmp_path / "loose", "loose", "all", [9])
    rows = stats(tmp_path)
    assert [(row.source, row.split) for row in rows] == [
        ("books", "train"),
        ("books", "validation"),
        ("loose", "all"),
        ("all", "all"),
    ]
    train, total = rows[0], rows[-1]
    assert (train.documents, train.text_documents, train.tokens) == (4, 2, 7306)
    assert (train.images, train.clips, train.frames, train.pixels) == (0, 2, 10, 120)
    tars = sorted((tmp_path / "books" / "train").glob("*.tar"))
    sizes = [tar.stat().st_size for tar in tars]
    assert (train.shards, train.bytes) == (len(sizes), sum(sizes))
    assert (train.smallest_shard, train.largest_shard) == (min(sizes), max(sizes))
    assert (train.tokens_per_document["min"], train.tokens_per_document["max"]) == (1, 7000)
    assert (total.documents, total.tokens, total.clips, total.shards) == (
        7,
        7339,
        4,
        sum(row.shards for row in rows[:-1]),
    )
    assert stats(tmp_path / "books" / "train") == [train]
    assert json.loads(json.dumps(plain_stats(rows)))["splits"][0]["tokens"] == 7306
    table = format_stats(rows).splitlines()
    assert table[1].split()[:4] == ["books", "train", "4", "7,306"]
    assert table[4].split()[:5] == ["all", "all", "7", "7,339", "3"]


@given(
    parts=st.lists(
        st.lists(st.integers(1, 600) | st.integers(1, 2**40), min_size=1, max_size=60),
        min_size=1,
        max_size=4,
    )
)
def test_percentiles_are_numpys(parts: list[list[int]]) -> None:
    """Exact up to 512, and 0.4 % below at most."""
    found = _quantiles(_joined([_histogram(np.array(part, np.uint64)) for part in parts]))
    lengths = np.concatenate([np.array(part) for part in parts])
    exact = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    assert (found["min"], found["max"]) == (lengths.min(), lengths.max())
    for p, value in zip(PERCENTILES, exact.tolist(), strict=True):
        assert value * (1 - 1 / 256) <= found[f"p{p}"] <= value
        assert value >= 512 or found[f"p{p}"] == value


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest.json, nor have its folders; give a"):
        stats(tmp_path)
    write(tmp_path / "loose", "loose", "all", [9])
    tar = tmp_path / "loose" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"shard-000000.tar: \d+ bytes, but \d+ were writ"):
        stats(tmp_path)
