"""Small corpora for the tests of `data`, whose token ids tell which document they belong to."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, SourceConfig
from data.shards import Sample, write_split

Texts = dict[str, list[NDArray[np.uint16]]]
"""Source -> token ids of its training documents, in the order of the shards."""


def unique_tokens(lengths: Mapping[str, Sequence[int]]) -> Texts:
    """Documents of the given lengths; no token id comes twice in all sources."""
    ids = count(3)
    return {
        name: [np.array([next(ids) for _ in range(length)], np.uint16) for length in sizes]
        for name, sizes in lengths.items()
    }


def write_corpus(
    folder: Path,
    texts: Texts,
    *,
    sequence_length: int,
    weights: Mapping[str, int] | None = None,
    num_lanes: int | None = None,
    prefetch_batches: int = 0,
    max_shard_bytes: int = 2**20,
) -> DataConfig:
    """Write both splits (the same documents in each) and return the config that reads them."""
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    for name, documents in texts.items():
        for split in ("train", "validation"):
            write_split(
                folder / name / split,
                [
                    Sample(
                        key=f"{name}/{i:04d}", metadata={"n": str(i)}, text=f"t{i}", tokens=tokens
                    )
                    for i, tokens in enumerate(documents)
                ],
                source=name,
                split=split,
                tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
                vocab_size=2**16,
                max_shard_bytes=max_shard_bytes,
            )
    return DataConfig(
        sources={
            name: SourceConfig(path=str(folder / name), weight=(weights or {}).get(name, 1))
            for name in texts
        },
        tokenizer=str(tokenizer),
        sequence_length=sequence_length,
        num_lanes=num_lanes,
        prefetch_batches=prefetch_batches,
    )
