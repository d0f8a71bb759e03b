"""The manifest of a folder of shards: what lies there, with hashes and counts.

`data.shards` writes it last; whoever reads shards begins with it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.index import MEDIUM_KINDS, ShardIndex, index_path

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
WITHOUT_SPLITS = "all"
HOW_TO_BUILD = "build it with `mneme data build quickstart` (`make quickstart` does)"
_VERSION = 2


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
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1)
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
            if version != _VERSION:
                raise ValueError(f"of version {version}, not {_VERSION}")
            shards = tuple(ShardEntry(**shard) for shard in fields.pop("shards"))
            if any(Path(shard.name).name != shard.name for shard in shards):
                raise ValueError("names a shard in another folder")
            return Manifest(**fields, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: {where} is no manifest that can be used ({error}); remove the corpus and "
                f"{HOW_TO_BUILD}"
            ) from error


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
