"""Indexes webdataset shards that others wrote: `mneme data index FOLDER --tokenizer FILE`.

The tars stay as they are. Beside each comes

    NAME.tar.tokens         token ids of its documents (`data.foreign_sample` says what they are)
    NAME.tar.widx           index (`data.index`)
    NAME.tar.indexed.json   what was ignored and left out; written last, so that an interrupted run
                            goes on with the shards that have none

and at the end FOLDER/manifest.json, which makes the folder a source without splits.
"""

import json
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.foreign_sample import ForeignDocument, UnusableSampleError, read_document
from data.index import TOKEN_DTYPES, ShardIndex, index_path, tokens_path
from data.indexing import IndexBuilder
from data.manifest import (
    MANIFEST_NAME,
    WITHOUT_SPLITS,
    Manifest,
    ShardEntry,
    file_sha256,
    shard_entry,
)
from data.processes import work_through
from data.tars import CorruptShardError, printable, read_samples
from data.tokenizer import RESERVED, Vocabulary, encode_parts, read_vocabulary

REPORT_SUFFIX = ".indexed.json"
_REPORT_VERSION = 1
_MAX_DETAIL = 200
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that is not trained on."""

    shard: str
    key: str
    cause: str
    detail: str


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What the index of a folder does not have of its shards."""

    left_out: tuple[LeftOut, ...]
    ignored: dict[str, int]
    """Members that nothing is made of: extension, or what they are -> number."""


@dataclass(frozen=True, slots=True)
class _Job:
    tar: Path
    tokenizer: Path
    tokenizer_sha256: str
    vocabulary: Vocabulary


def index_folder(
    folder: Path, *, tokenizer: Path, source: str | None = None, progress: bool = True
) -> Manifest:
    """Tokenise and index all shards of a folder, and write its manifest.

    Shards that have been indexed with this tokenizer and have not changed since are not read
    again. Memory: the index of one shard for each process.

    Args:
        folder: with the shards, NAME.tar.
        tokenizer: a `tokenizers` JSON file.
        source: name in messages and metrics; None: that of the folder.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: there are no shards, they are compressed or were written by `mneme data build`,
            they have media but the tokenizer has no token to mark them, or no sample can be used.
        CorruptShardError: shards are damaged; the others are indexed.
        ImportError: PyAV is missing, for clips.
    """
    tars = _shards(folder)
    vocabulary = read_vocabulary(tokenizer)
    digest = file_sha256(tokenizer, key=f"--tokenizer={tokenizer}")
    jobs = [_Job(tar, tokenizer, digest, vocabulary) for tar in tars]
    sizes = [tar.stat().st_size for tar in tars]
    entries: list[ShardEntry] = []
    damaged: list[str] = []
    for result in work_through(
        _index_shard, jobs, sizes, description=f"index {folder}", progress=progress
    ):
        if isinstance(result, ShardEntry):
            entries.append(result)
        else:
            damaged.append(result)
    if damaged:
        raise CorruptShardError(
            "\n".join(damaged)
            + f"\n{len(entries)} of {len(tars)} shards are indexed; restore these from a copy or "
            "remove them, and type the same again"
        )
    has_media = any(entry.images or entry.videos for entry in entries)
    manifest = Manifest(
        source=source or folder.resolve().name,
        split=WITHOUT_SPLITS,
        tokenizer_sha256=digest,
        vocab_size=vocabulary.size,
        media_token_id=vocabulary.media if has_media else None,
        shards=tuple(entries),
    )
    if not manifest.samples:
        causes = Counter(one.cause for one in read_report(folder).left_out)
        raise ValueError(f"{folder}: no sample can be used: {dict(causes)}")
    manifest.write(folder)
    return manifest


def read_report(folder: Path) -> FolderReport:
    """What `index_folder` left out, of all shards that are indexed."""
    left_out: list[LeftOut] = []
    ignored: Counter[str] = Counter()
    for path in sorted(folder.glob(f"*.tar{REPORT_SUFFIX}")):
        fields = json.loads(path.read_bytes())
        shard = path.name.removesuffix(REPORT_SUFFIX)
        left_out += [LeftOut(shard, *row) for row in fields["left_out"]]
        ignored.update(fields["ignored"])
    return FolderReport(tuple(left_out), dict(sorted(ignored.items())))


def format_report(manifest: Manifest, report: FolderReport) -> str:
    """Lines for people."""
    lines = [
        f"source {manifest.source}: {manifest.samples:,} documents, {manifest.tokens:,} tokens in "
        f"{len(manifest.shards):,} shards"
    ]
    for cause, number in sorted(Counter(one.cause for one in report.left_out).items()):
        lines.append(f"  left out: {number:,} samples, {cause}")
    for what, number in report.ignored.items():
        lines.append(f"  ignored: {number:,} members, {printable(what)}")
    if report.left_out:
        lines.append(f"  each is listed in NAME.tar{REPORT_SUFFIX}")
    return "\n".join(lines)


def _shards(folder: Path) -> list[Path]:
    """The tars of a folder, sorted.

    Raises:
        ValueError: there are none, they are compressed, or they have an index of another kind.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; give the folder with the shards")
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    compressed = [path for path in folder.iterdir() if path.name.lower().endswith(_COMPRESSED)]
    for tar in tars:
        with tar.open("rb") as file:
            compressed += [tar] if file.read(6).startswith(_COMPRESSED_MAGIC) else []
    if compressed:
        raise ValueError(
            f"{min(compressed)}: is compressed, so its samples cannot be read at random; unpack all "
            f"{len(compressed)} shards to NAME.tar, e.g. with gunzip"
        )
    if not tars:
        raise ValueError(f"{folder}: has no shards NAME.tar; give the folder that has them")
    if (folder / MANIFEST_NAME).is_file() and not any(_report_path(tar).is_file() for tar in tars):
        raise ValueError(
            f"{folder / MANIFEST_NAME}: was not written by `mneme data index`; shards of `mneme data "
            "build` have their index; remove the file if these are others"
        )
    return tars


def _index_shard(job: _Job) -> ShardEntry | str:
    """Index a shard unless it is; a text if it is damaged."""
    finished = _finished(job)
    if finished:
        return finished
    before = job.tar.stat().st_mtime_ns
    ignored: Counter[str] = Counter()
    left_out: list[tuple[str, str, str]] = []
    path = tokens_path(job.tar)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as tokens:
            index = _index_samples(job, tokens, ignored, left_out)
    except CorruptShardError as error:
        partial.unlink()
        return str(error)
    partial.rename(path)
    index.write(job.tar)
    entry = shard_entry(job.tar, index)
    report = {
        "version": _REPORT_VERSION,
        "tokenizer_sha256": job.tokenizer_sha256,
        "modified": before,
        "entry": asdict(entry),
        "ignored": ignored,
        "left_out": left_out,
    }
    report_path = _report_path(job.tar)
    partial = report_path.with_name(report_path.name + ".partial")
    partial.write_text(json.dumps(report))
    partial.rename(report_path)
    return entry


def _finished(job: _Job) -> ShardEntry | None:
    """The entry of a shard that is indexed as it would be now."""
    try:
        report = json.loads(_report_path(job.tar).read_bytes())
        expected = (_REPORT_VERSION, job.tokenizer_sha256, job.tar.stat().st_mtime_ns)
        if (report["version"], report["tokenizer_sha256"], report["modified"]) != expected:
            return None
        entry = ShardEntry(**report["entry"])
        ShardIndex.open(job.tar)
        sidecar = index_path(job.tar)
        return entry if file_sha256(sidecar, key=str(sidecar)) == entry.index_sha256 else None
    # Whatever is missing or was cut short is made again.
    except (FileNotFoundError, CorruptShardError, KeyError, TypeError, ValueError):
        return None


def _encode(job: _Job, document: ForeignDocument) -> NDArray[np.uint32]:
    """Token ids, a marker for each medium and the end of document included."""
    vocabulary = job.vocabulary
    if document.media and vocabulary.media is None:
        raise ValueError(
            f"--tokenizer={job.tokenizer}: {job.tar} has images or clips, but the tokenizer has no "
            f"token to mark them; add a special token named {RESERVED}"
        )
    batch = {"parts": [list(document.parts)]}
    encoded = encode_parts(batch, str(job.tokenizer), vocabulary.end, vocabulary.media)
    return np.array(encoded["tokens"][0], np.uint32)


def _report_path(tar: Path) -> Path:
    return tar.with_name(tar.name + REPORT_SUFFIX)


def _index_samples(
    job: _Job, tokens: BinaryIO, ignored: Counter[str], left_out: list[tuple[str, str, str]]
) -> ShardIndex:
    builder = IndexBuilder()
    dtype = TOKEN_DTYPES["u16" if job.vocabulary.size <= 2**16 else "u32"]
    keys: set[str] = set()
    for sample in read_samples(job.tar, ignored):
        key = sample[0].key
        try:
            if key in keys:
                raise UnusableSampleError("key comes twice")
            keys.add(key)
            document = read_document(sample, ignored)
        except UnusableSampleError as error:
            left_out.append((key, error.cause, error.detail[:_MAX_DETAIL]))
            continue
        ids = _encode(job, document)
        raw = ids.astype(dtype).tobytes()
        places = np.flatnonzero(ids == job.vocabulary.media).tolist() if document.media else []
        media = zip(document.media, places, strict=True)
        builder.add(
            sample,
            [replace(medium, place=place) for medium, place in media],
            token_offset=tokens.tell(),
            num_tokens=len(ids),
            token_crc32=zlib.crc32(raw),
        )
        tokens.write(raw)
    return builder.finish(
        tar_bytes=job.tar.stat().st_size,
        token_bytes=dtype.itemsize,
        tokens_file_bytes=tokens.tell(),
    )
