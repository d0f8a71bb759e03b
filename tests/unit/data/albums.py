"""Corpora of pictures and clips on disk, small and of random numbers, for tests."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, ImageConfig, SourceConfig
from data.pictures import VisionGeometry
from data.pictures_corpus import encode_clip
from data.shards import Sample, SampleMedium, write_split
from tests.unit.data.pixels import jpeg, noise

MARKER = 2
VISION = VisionGeometry(
    placeholder_token_id=MARKER, patch_size=4, frames_per_patch=2, spatial_merge=2
)
IMAGE = ImageConfig(max_rows=6, frames_per_second=5.0, max_frames=8)
"""A clip takes at most 6 x 8 / 2 = 24 tokens."""


def image(seed: int) -> SampleMedium:
    """Of a size that depends on the seed."""
    width, height = 8 + seed * 7 % 40, 8 + seed * 5 % 30
    payload = jpeg(noise(width, height, seed))
    return SampleMedium(extension="jpg", payload=payload, kind="image", width=width, height=height)


@cache
def clip(seed: int) -> SampleMedium:
    """A second or less at 10 frames per second, in which colours change."""
    frames = [noise(32, 24, seed * 100 + number) for number in range(3 + seed % 8)]
    return SampleMedium(
        extension="mp4",
        payload=encode_clip(frames, 10),
        kind="video",
        width=32,
        height=24,
        frames=len(frames),
        fps=10.0,
    )


def document(key: str, parts: Sequence[int | SampleMedium]) -> Sample:
    """A document of tokens and media in order."""
    media = tuple(part for part in parts if isinstance(part, SampleMedium))
    sequence: list[dict[str, Any]] = [
        {"t": str(part)} if isinstance(part, int) else part.part(media.index(part))
        for part in parts
    ]
    tokens = [part if isinstance(part, int) else MARKER for part in parts]
    return Sample(
        key=key,
        metadata={"v": 1, "kind": "interleaved", "seq": sequence},
        text="",
        tokens=np.array([*tokens, 0], np.uint16),
        media=media,
    )


def write_album(
    folder: Path,
    documents: Sequence[Sample],
    *,
    sequence_length: int = 32,
    tokenizer: Path | None = None,
    vocab_size: int = 2**16,
    **config: Any,
) -> DataConfig:
    """Write the documents as source `album`, and text as source `text`; the config that reads them."""
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text('{"added_tokens": [{"id": 1, "content": "<|pad|>"}]}')
    text = [document(f"text/{n:03d}", range(3, 12 + 5 * n)) for n in range(9)]
    for name, samples, marker in (("album", documents, MARKER), ("text", text, None)):
        for split in ("train", "validation"):
            write_split(
                folder / name / split,
                samples,
                source=name,
                split=split,
                tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
                vocab_size=vocab_size,
                media_token_id=marker,
            )
    return DataConfig(
        sources={name: SourceConfig(path=str(folder / name)) for name in ("album", "text")},
        tokenizer=str(tokenizer),
        sequence_length=sequence_length,
        image=IMAGE,
        **config,
    )


def some_documents(number: int) -> list[Sample]:
    """Text, images and clips in turns."""
    kinds: list[list[int | SampleMedium]] = [
        [5, 6, image(n), 7, image(n + 1)] if n % 3 else [clip(n), 8, 9, 10] for n in range(number)
    ]
    return [document(f"album/{n:03d}", parts) for n, parts in enumerate(kinds)]
