"""Shards on disk: what `data.build` writes and `data.reader` and stock webdataset read.

    SOURCE/SPLIT/shard-000000.tar        webdataset samples: KEY.json, KEY.m0.jpg, KEY.txt, KEY.u16
    SOURCE/SPLIT/shard-000000.tar.widx   index (`data.index`)
    SOURCE/SPLIT/manifest.json           the shards with their hashes and counts

A source without splits (`data.foreign`) has its manifest and its shards in SOURCE itself.

The tar is the truth; the token ids in it are the text encoded with the corpus' tokenizer, and one
marker for each image or clip.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.index import (
    MEDIUM_KINDS,
    TOKEN_DTYPES,
    MediumKind,
    ShardIndex,
    index_path,
)
from data.indexing import build_index
from data.tars import CorruptShardError

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
WITHOUT_SPLITS = "all"
HOW_TO_BUILD = "build it with `mneme data build quickstart` (`make quickstart` does)"
_MANIFEST_VERSION = 2
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


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as the manifest knows it."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    samples: int
    tokens: int
    """Markers of media included."""
    images: int
    videos: int
    pixels: int
    """Of images and of all frames of clips, as they are stored."""
    frames: int
    """Of clips."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of one split of one source."""

    source: str
    split: str
    """train, validation, or all where the source has no splits."""
    tokenizer_sha256: str
    """Of the tokenizer file that the token ids come from."""
    vocab_size: int
    media_token_id: int | None
    """Stands for an image or clip among the token ids; None: there are none."""
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Documents of the split."""
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        text = json.dumps({"version": _MANIFEST_VERSION, **asdict(self)}, indent=1)
        (folder / MANIFEST_NAME).write_text(text + "\n")

    @staticmethod
    def read(folder: Path, *, key: str) -> "Manifest":
        """Read `folder`/manifest.json; `key` is the config path that errors name.

        Raises:
            ValueError: there is none, it is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{key}: there is no {path.absolute()}; {HOW_TO_BUILD}")
        return Manifest.parse(path.read_bytes(), where=str(path.absolute()), key=key)

    @staticmethod
    def parse(text: bytes, *, where: str, key: str) -> "Manifest":
        """The manifest whose file holds `text`; `where` and `key` name it in errors.

        Raises:
            ValueError: it is damaged or of another version.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("version", None)
            if version != _MANIFEST_VERSION:
                raise ValueError(f"of version {version}, not {_MANIFEST_VERSION}")
            shards = tuple(ShardEntry(**shard) for shard in fields.pop("shards"))
            if any(Path(shard.name).name != shard.name for shard in shards):
                raise ValueError("names a shard in another folder")
            return Manifest(**fields, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: {where} is no manifest that can be used ({error}); remove the corpus and "
                f"{HOW_TO_BUILD}"
            ) from error


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


def split_folders(source: Path) -> dict[str, Path]:
    """Where the manifests of a source lie, by split: "all" for one without splits."""
    if (source / MANIFEST_NAME).is_file():
        return {WITHOUT_SPLITS: source}
    return {split: source / split for split in SPLITS}


def corpus_fingerprint(sources: Mapping[str, Path], tokenizer: Path) -> str:
    """Identify what is trained on: all shards of the named sources, through their manifests' hashes.

    Args:
        sources: name -> folder with a folder per split, or with the shards themselves.
        tokenizer: the tokenizer file.

    Raises:
        ValueError: a file is missing.
    """
    digest = hashlib.sha256(file_sha256(tokenizer, key="data.tokenizer").encode())
    for name, folder in sorted(sources.items()):
        for split, split_folder in split_folders(folder).items():
            manifest = split_folder / MANIFEST_NAME
            digest.update(f"{name}/{split} ".encode())
            digest.update(file_sha256(manifest, key=f"data.sources.{name}.path").encode())
    return digest.hexdigest()


def file_sha256(path: Path, *, key: str) -> str:
    """Hash a file in constant memory; `key` is the config path that errors name.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{key}: there is no {path.absolute()}; {HOW_TO_BUILD}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_entry(tar: Path, index: ShardIndex) -> ShardEntry:
    """Describe a shard whose index is written."""
    return ShardEntry(
        name=tar.name,
        bytes=index.tar_bytes,
        sha256=file_sha256(tar, key=str(tar)),
        index_sha256=file_sha256(index_path(tar), key=str(index_path(tar))),
        **shard_counts(index),
    )


def shard_counts(index: ShardIndex) -> dict[str, int]:
    """The counts of a `ShardEntry`."""
    videos = index.media_kind == MEDIUM_KINDS.index("video")
    pixels = index.media_width.astype(np.uint64) * index.media_height * index.media_frames
    return {
        "samples": len(index),
        "tokens": int(index.num_tokens.sum()),
        "images": int((~videos).sum()),
        "videos": int(videos.sum()),
        "pixels": int(pixels.sum()),
        "frames": int(index.media_frames[videos].sum(dtype=np.uint64)),
    }


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
