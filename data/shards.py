"""Shards on disk: what `data.build` writes and `data.reader` and stock webdataset read.

    SOURCE/SPLIT/shard-000000.tar        webdataset samples: KEY.json, KEY.txt, KEY.u16
    SOURCE/SPLIT/shard-000000.tar.widx   index (`data.index`)
    SOURCE/SPLIT/manifest.json           the shards with their hashes and counts

The tar is the truth; the token ids in it are the text encoded with the corpus' tokenizer.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.index import TOKEN_DTYPES, CorruptShardError, build_index, index_path

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
HOW_TO_BUILD = "build it with `mneme data build quickstart` (`make quickstart` does)"
_MANIFEST_VERSION = 1
_MAX_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document as it goes into a shard."""

    key: str
    """Unique in the source; no dot after the last slash, by webdataset's rule."""
    metadata: dict[str, str]
    text: str
    tokens: NDArray[np.unsignedinteger]
    """Token ids of the text and the end-of-document id."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as the manifest knows it."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    samples: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of one split of one source."""

    source: str
    split: str
    tokenizer_sha256: str
    """Of the tokenizer file that the token ids come from."""
    vocab_size: int
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
            ValueError: there is none, or of another version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{key}: there is no {path.absolute()}; {HOW_TO_BUILD}")
        fields = json.loads(path.read_text())
        if fields.pop("version", None) != _MANIFEST_VERSION:
            raise ValueError(
                f"{key}: {path.absolute()} is not a manifest of version {_MANIFEST_VERSION}; "
                f"remove the corpus and {HOW_TO_BUILD}"
            )
        shards = tuple(ShardEntry(**shard) for shard in fields.pop("shards"))
        return Manifest(**fields, shards=shards)


def write_split(
    folder: Path,
    samples: Iterable[Sample],
    *,
    source: str,
    split: str,
    tokenizer_sha256: str,
    vocab_size: int,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> Manifest:
    """Write samples, in their order, as shards with indexes and a manifest into a new folder.

    Equal samples give equal bytes.

    Raises:
        CorruptShardError: what can be read back is not what was written.
    """
    # Here, for webdataset takes a second to import and ranks never write.
    from webdataset import ShardWriter  # noqa: PLC0415

    folder.mkdir(parents=True)
    extension = "u16" if vocab_size <= 2**16 else "u32"
    written = 0
    with ShardWriter(
        str(folder / "shard-%06d.tar"), maxsize=max_shard_bytes, verbose=0, mtime=0.0
    ) as writer:
        for sample in samples:
            # webdataset sorts the members by extension, so the metadata come first.
            writer.write(
                {
                    "__key__": sample.key,
                    "json": json.dumps({"source": source, **sample.metadata}),
                    "txt": sample.text,
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
        shards=tuple(_index_shard(tar) for tar in sorted(folder.glob("shard-*.tar"))),
    )
    if manifest.samples != written:
        raise CorruptShardError(f"{folder}: wrote {written} samples, read back {manifest.samples}")
    manifest.write(folder)
    return manifest


def corpus_fingerprint(sources: Mapping[str, Path], tokenizer: Path) -> str:
    """Identify what is trained on: all shards of the named sources, through their manifests' hashes.

    Args:
        sources: name -> folder with a folder per split.
        tokenizer: the tokenizer file.

    Raises:
        ValueError: a file is missing.
    """
    digest = hashlib.sha256(file_sha256(tokenizer, key="data.tokenizer").encode())
    for name, folder in sorted(sources.items()):
        for split in SPLITS:
            manifest = folder / split / MANIFEST_NAME
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


def _index_shard(tar: Path) -> ShardEntry:
    index = build_index(tar)
    index.write(tar)
    return ShardEntry(
        name=tar.name,
        bytes=index.tar_bytes,
        sha256=file_sha256(tar, key=str(tar)),
        index_sha256=file_sha256(index_path(tar), key=str(index_path(tar))),
        samples=len(index),
        tokens=int(index.num_tokens.sum()),
    )
