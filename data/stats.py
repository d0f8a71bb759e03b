"""`mneme data stats`: what a corpus holds, from its manifests and indexes alone; no shard is read."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.index import ShardIndex
from data.manifest import Manifest
from data.verify import find_parts

PERCENTILES = (5, 25, 50, 75, 95)
_CHUNK = 2**20
# Lengths below 2 * _STEPS have a bin each; above, each power of two has _STEPS bins.
_STEPS = 256
_BINS = _STEPS * 58


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """Counts of one split of one source, or of all."""

    source: str
    split: str
    documents: int
    text_documents: int
    """Documents without images and clips."""
    tokens: int
    """As stored: an image or clip counts as one, as does the end of a document."""
    images: int
    clips: int
    pixels: int
    """Of images and of all frames of clips, as they are stored."""
    frames: int
    """Of clips."""
    shards: int
    bytes: int
    """Of the tars."""
    smallest_shard: int
    largest_shard: int
    tokens_per_document: dict[str, int] = field(default_factory=dict)
    """min, p5 ... p95, max; percentiles above 512 are rounded down by up to 0.4 %."""


@dataclass(frozen=True)
class _Lengths:
    """Histogram of the tokens of documents: memory does not grow with them."""

    bins: NDArray[np.int64]
    smallest: int
    largest: int


def stats(folder: Path) -> list[SplitStats]:
    """Count per source and split.

    Args:
        folder: a corpus (several sources), a source, or one split of a source.

    Returns:
        A row for each split of each source, sorted, and one for all where there are several.

    Raises:
        ValueError: there is nothing to count, or a manifest is not of this version.
        CorruptShardError: an index does not fit its shard.
        FileNotFoundError: a shard or its index is missing.
    """
    parts = find_parts(folder)
    if not parts:
        raise ValueError(
            f"{folder}: has no manifest.json, nor have its folders; give a folder that `mneme data "
            "build` or `mneme data index` made"
        )
    rows, lengths = [], []
    for part in parts:
        manifest = Manifest.read(part.folder, key=part.name)
        row, histogram = _split_stats(part.folder, manifest)
        rows.append(row)
        lengths.append(histogram)
    return [*rows, _total(rows, _joined(lengths))] if len(rows) > 1 else rows


def plain_stats(rows: Sequence[SplitStats]) -> dict[str, Any]:
    """For `--json`."""
    return {"splits": [asdict(row) for row in rows]}


def format_stats(rows: Sequence[SplitStats]) -> str:
    """Two tables for people: contents, and lengths of documents in tokens."""
    counts = ("documents", "tokens", "text_documents", "images", "clips", "frames", "shards")
    titles = ("documents", "tokens", "text", "images", "clips", "frames", "shards")
    contents = [["source", "split", *titles, "megapixels", "bytes", "shard bytes"]]
    quantiles = list(rows[0].tokens_per_document)
    lengths = [["source", "split", "tokens per document: mean", *quantiles]]
    for r in rows:
        numbers = [f"{getattr(r, count):,}" for count in counts]
        sizes = f"{_bytes(r.smallest_shard)} - {_bytes(r.largest_shard)}"
        megapixels = f"{r.pixels / 1e6:,.1f}"
        contents.append([r.source, r.split, *numbers, megapixels, _bytes(r.bytes), sizes])
        mean = f"{r.tokens / r.documents:,.1f}"
        lengths.append(
            [r.source, r.split, mean, *(f"{n:,}" for n in r.tokens_per_document.values())]
        )
    return "\n\n".join("\n".join(_aligned(table)) for table in (contents, lengths))


def _split_stats(folder: Path, manifest: Manifest) -> tuple[SplitStats, _Lengths]:
    text_documents = 0
    lengths = []
    for shard in manifest.shards:
        index = ShardIndex.open(folder / shard.name)
        for start in range(0, len(index), _CHUNK):
            media = np.diff(index.first_media[start : start + _CHUNK + 1])
            text_documents += int((media == 0).sum())
            lengths.append(_histogram(index.num_tokens[start : start + _CHUNK]))
        if len(lengths) > 1:
            lengths = [_joined(lengths)]
    histogram = _joined(lengths)
    sizes = [shard.bytes for shard in manifest.shards]
    row = SplitStats(
        source=manifest.source,
        split=manifest.split,
        documents=manifest.samples,
        text_documents=text_documents,
        tokens=manifest.tokens,
        images=sum(shard.images for shard in manifest.shards),
        clips=sum(shard.videos for shard in manifest.shards),
        pixels=sum(shard.pixels for shard in manifest.shards),
        frames=sum(shard.frames for shard in manifest.shards),
        shards=len(sizes),
        bytes=sum(sizes),
        smallest_shard=min(sizes),
        largest_shard=max(sizes),
        tokens_per_document=_quantiles(histogram),
    )
    return row, histogram


def _total(rows: Sequence[SplitStats], lengths: _Lengths) -> SplitStats:
    names = ("documents", "text_documents", "tokens", "images", "clips", "pixels", "frames")
    sums = {name: sum(getattr(row, name) for row in rows) for name in (*names, "shards", "bytes")}
    return SplitStats(
        source="all",
        split="all",
        smallest_shard=min(row.smallest_shard for row in rows),
        largest_shard=max(row.largest_shard for row in rows),
        tokens_per_document=_quantiles(lengths),
        **sums,
    )


def _histogram(lengths: NDArray[np.uint64]) -> _Lengths:
    numbers = lengths.astype(np.int64)
    # frexp gives the number of bits.
    shift = np.maximum(0, np.frexp(numbers.astype(np.float64))[1] - _STEPS.bit_length())
    bins = np.bincount(shift * _STEPS + (numbers >> shift), minlength=_BINS)
    return _Lengths(bins, int(numbers.min()), int(numbers.max()))


def _joined(parts: Sequence[_Lengths]) -> _Lengths:
    bins = np.sum([part.bins for part in parts], axis=0)
    return _Lengths(bins, min(p.smallest for p in parts), max(p.largest for p in parts))


def _quantiles(lengths: _Lengths) -> dict[str, int]:
    """The smallest length that at least p % of the documents do not exceed."""
    counts = np.cumsum(lengths.bins)
    places = np.searchsorted(counts, [counts[-1] * p / 100 for p in PERCENTILES])
    middle = {f"p{p}": _lowest(int(place)) for p, place in zip(PERCENTILES, places, strict=True)}
    return {"min": lengths.smallest, **middle, "max": lengths.largest}


def _lowest(place: int) -> int:
    """The smallest length of a bin."""
    shift = max(0, place // _STEPS - 1)
    return (place - shift * _STEPS) << shift


def _bytes(size: int) -> str:
    power = min(5, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:,.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
