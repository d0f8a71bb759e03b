"""Shards on disk: what `data.build` writes and `data.reader` and stock webdataset read.

    SOURCE/SPLIT/shard-000000.tar        webdataset samples: KEY.json, KEY.m0.jpg, KEY.txt, KEY.u16
    SOURCE/SPLIT/shard-000000.tar.widx   index (`data.index`)
    SOURCE/SPLIT/manifest.json           the shards with their hashes and counts

A source without splits (`data.foreign`) has its manifest and its shards in SOURCE itself.

The tar is the truth; the token ids in it are the text encoded with the corpus' tokenizer, and one
marker for each image or clip.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.index import TOKEN_DTYPES, MediumKind
from data.indexing import build_index
from data.manifest import Manifest, ShardEntry, shard_entry
from data.tars import CorruptShardError

_MAX_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleMedium:
    """An image or clip as it goes into a shard; its file is stored as it is."""

    extension: str
    """Of the file: jpg, png, webp, mp4, ..."""
    payload: bytes = field(repr=False)
    kind: MediumKind
    width: int
    """In pixels."""
    height: int
    frames: int = 1
    """1 for images."""
    fps: float = 0.0
    """Frames per second; 0 for images."""
    first_frame: int = 0
    """First frame of the file that counts."""
    same_file: bool = False
    """It is another part of the medium before it, whose file is stored once."""

    def member(self, number: int) -> str:
        """Extension of its member, as the `number`-th file of its document."""
        return f"m{number}.{self.extension}"

    def part(self, number: int) -> dict[str, Any]:
        """What `seq` in the document's metadata says of it, in the `number`-th file."""
        size = {"w": self.width, "h": self.height}
        if self.kind == "image":
            return {"img": self.member(number), **size}
        clip = {"fps": self.fps, "n": self.frames, "start": self.first_frame}
        return {"vid": self.member(number), **size, **clip}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document as it goes into a shard."""

    key: str
    """Unique in the source; no dot after the last slash, by webdataset's rule."""
    metadata: dict[str, Any]
    """Goes into KEY.json, beside the source. With media: `seq`, the document's texts ({"t": ...}) and
    media (`SampleMedium.part`) in order."""
    text: str
    """All of it; empty: no KEY.txt is written."""
    tokens: NDArray[np.unsignedinteger]
    """Token ids of the text, the marker of each medium in its place, and the end-of-document id."""
    media: tuple[SampleMedium, ...] = ()
    """In order of appearance."""


def write_split(
    folder: Path,
    samples: Iterable[Sample],
    *,
    source: str,
    split: str,
    tokenizer_sha256: str,
    vocab_size: int,
    media_token_id: int | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> Manifest:
    """Write samples, in their order, as shards with indexes and a manifest into a new folder.

    Equal samples give equal bytes.

    Args:
        folder: to make; SOURCE/SPLIT, or SOURCE for the split "all".
        samples: the documents.
        source: name of the source.
        split: train, validation or all.
        tokenizer_sha256: of the tokenizer file.
        vocab_size: every token id is below it.
        media_token_id: the marker of media; None: no document has any.
        max_shard_bytes: a new shard is begun after this many.

    Raises:
        ValueError: no documents, or one whose metadata or markers do not fit its media.
        CorruptShardError: what can be read back is not what was written.
    """
    # Here, for webdataset takes a second to import and ranks never write.
    from webdataset import ShardWriter  # noqa: PLC0415

    folder.mkdir(parents=True)
    extension = "u16" if vocab_size <= 2**16 else "u32"
    written = 0
    # A whole number: another would take two more blocks before each member.
    with ShardWriter(
        str(folder / "shard-%06d.tar"), maxsize=max_shard_bytes, verbose=0, mtime=0
    ) as writer:
        for sample in samples:
            _check_media(sample, media_token_id)
            # webdataset sorts the members by extension, so the metadata come first.
            writer.write(
                {
                    "__key__": sample.key,
                    "json": json.dumps({"source": source, **sample.metadata}),
                    **{m.member(i): m.payload for i, m in files(sample.media)},
                    **({"txt": sample.text} if sample.text else {}),
                    extension: sample.tokens.astype(TOKEN_DTYPES[extension]).tobytes(),
                }
            )
            written += 1
    if not written:
        raise ValueError(f"{folder}: no documents to write; give the source more documents")
    manifest = Manifest(
        source=source,
        split=split,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        media_token_id=media_token_id,
        shards=tuple(
            _index_shard(tar, media_token_id) for tar in sorted(folder.glob("shard-*.tar"))
        ),
    )
    if manifest.samples != written:
        raise CorruptShardError(f"{folder}: wrote {written} samples, read back {manifest.samples}")
    manifest.write(folder)
    return manifest


def files(media: Sequence[SampleMedium]) -> Iterator[tuple[int, SampleMedium]]:
    """Yield each medium of a document with the number of its file."""
    numbers = accumulate(int(number > 0 and not m.same_file) for number, m in enumerate(media))
    return zip(numbers, media, strict=True)


def _index_shard(tar: Path, media_token_id: int | None) -> ShardEntry:
    index = build_index(tar, media_token_id=media_token_id)
    index.write(tar)
    return shard_entry(tar, index)


def _check_media(sample: Sample, media_token_id: int | None) -> None:
    """Raise before a document is written that could not be indexed."""
    parts = [part for part in sample.metadata.get("seq", ()) if "t" not in part]
    if sample.media and media_token_id is None:
        raise ValueError(f"key {sample.key}: has media; give write_split a media_token_id")
    if parts != [medium.part(number) for number, medium in files(sample.media)]:
        raise ValueError(f"key {sample.key}: metadata.seq must list its media; use part()")
    markers = 0 if media_token_id is None else int((sample.tokens == media_token_id).sum())
    if markers != len(sample.media):
        raise ValueError(
            f"key {sample.key}: {markers} markers among its tokens for {len(sample.media)} media; "
            f"put the id {media_token_id} where each appears, and nowhere else"
        )
