"""Writes one chunk of a source: drafts -> token ids -> shards, in a folder that is then renamed."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data.importers.drafts import (
    Importer,
    LeftOut,
    Report,
    is_held_out,
    unique_key,
)
from data.shards import Sample, SampleMedium, files, write_split
from data.tokenizer import Datasets, Table, Vocabulary, encode_parts, hugging_face

REPORT_NAME = "report.json"
_ENCODE_BATCH = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """Items start..stop (exclusive) of an importer."""

    number: int
    start: int
    stop: int
    bytes: int
    again: tuple[tuple[int, ...], ...] = ()
    """Items whose key came before, each with how often it came by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkJob:
    """What all chunks of a source have in common; goes to every process once."""

    importer: Importer
    source: str
    folder: Path
    """Where the finished chunks are."""
    tokenizer: Path
    tokenizer_sha256: str
    vocabulary: Vocabulary
    held_out: float
    max_shard_bytes: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of what is written."""
        return ("train", "validation") if self.held_out else ("all",)

    def split_of(self, key: str) -> str:
        """Where a document goes."""
        if not self.held_out:
            return "all"
        return "validation" if is_held_out(key, self.held_out) else "train"

    def chunk_folder(self, chunk: Chunk) -> Path:
        """There once the chunk is finished."""
        return self.folder / f"{chunk.number:06d}"


def write_chunk(job: ChunkJob, chunk: Chunk, processes: int) -> None:
    """Write a chunk, whole or not at all.

    Args:
        job: what it belongs to.
        chunk: its items.
        processes: that encode.
    """
    with tempfile.TemporaryDirectory(prefix=f".{chunk.number:06d}-", dir=job.folder) as name:
        made = Path(name) / "chunk"
        made.mkdir()
        report = Report()
        rows = _rows(job, chunk, report)
        first = next(rows, None)
        if first is not None:
            with hugging_face(progress=False) as datasets:
                table = _encode(datasets, chain([first], rows), job, Path(name), processes)
                _write(table, job, made)
        (made / REPORT_NAME).write_text(json.dumps(report.plain()))
        made.rename(job.chunk_folder(chunk))


def _rows(job: ChunkJob, chunk: Chunk, report: Report) -> Iterator[dict[str, Any]]:
    """Rows of the table that is encoded; tells the report the rest."""
    times = {item: number for item, number in chunk.again}  # noqa: C416 - two of each
    for draft in job.importer.drafts(chunk.start, chunk.stop):
        if isinstance(draft, LeftOut):
            report.left_out.append(draft)
            continue
        report.cut += draft.part == 1
        report.renamed += draft.item in times and not draft.part
        yield {
            "key": unique_key(draft, times.get(draft.item, 1)),
            "title": draft.title,
            "parts": list(draft.parts),
            "media": json.dumps([asdict(medium) for medium in draft.media]),
        }


def _encode(
    datasets: Datasets, rows: Iterator[dict[str, Any]], job: ChunkJob, work: Path, processes: int
) -> Table:
    """The rows as a memory-mapped table with their token ids."""
    text = datasets.Value("large_string")
    features = datasets.Features(
        {"key": text, "title": text, "parts": datasets.List(text), "media": text}
    )
    try:
        table = datasets.Dataset.from_generator(
            lambda: rows,
            features=features,
            cache_dir=str(work),
            fingerprint="rows",  # made once, in a folder of its own
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what the importer raised
    return table.map(
        encode_parts,
        fn_kwargs={
            "tokenizer": str(job.tokenizer),
            "end": job.vocabulary.end,
            "media": job.vocabulary.media,
        },
        batched=True,
        batch_size=_ENCODE_BATCH,
        features=datasets.Features({**features, "tokens": datasets.List(datasets.Value("uint32"))}),
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(work / "tokens.arrow"),
        new_fingerprint="tokens",
    )


def _write(table: Table, job: ChunkJob, folder: Path) -> None:
    """Write the shards of each split that has documents, in the order of the items."""
    splits = [job.split_of(key) for key in table["key"]]
    table = table.with_format("numpy", ["tokens"], output_all_columns=True)
    for split in job.splits:
        chosen = [row for row, of_row in enumerate(splits) if of_row == split]
        if chosen:
            write_split(
                folder / split,
                (_sample(job.importer, row) for row in table.select(chosen)),
                source=job.source,
                split=split,
                tokenizer_sha256=job.tokenizer_sha256,
                vocab_size=job.vocabulary.size,
                media_token_id=job.vocabulary.media if job.importer.has_media else None,
                max_shard_bytes=job.max_shard_bytes,
            )


def _sample(importer: Importer, row: dict[str, Any]) -> Sample:
    """A row as a document; the bytes of its media are read here."""
    media: list[SampleMedium] = []
    before = ""
    for fields in json.loads(row["media"]):
        reference = fields.pop("reference")
        again = reference == before
        payload = media[-1].payload if again else importer.payload(reference)
        media.append(SampleMedium(**fields, payload=payload, same_file=again))
        before = reference
    metadata = {"title": row["title"]}
    if media:
        metadata |= {"v": 1, "kind": "interleaved", "seq": _sequence(row["parts"], media)}
    return Sample(
        key=row["key"],
        metadata=metadata,
        text="\n".join(part for part in row["parts"] if part is not None),
        tokens=row["tokens"].astype(np.uint32),
        media=tuple(media),
    )


def _sequence(parts: list[str | None], media: list[SampleMedium]) -> list[dict[str, Any]]:
    """What the document's metadata say of its texts and media, in order."""
    described = (medium.part(number) for number, medium in files(media))
    return [next(described) if part is None else {"t": part} for part in parts]
