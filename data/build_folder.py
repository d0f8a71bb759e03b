"""The folder beside a corpus where a source is built: one build at a time, continued or refused."""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.build_chunk import REPORT_NAME, ChunkJob
from data.index import index_path
from data.manifest import WITHOUT_SPLITS, Manifest, ShardEntry

IMPORT_NAME = "import.json"
"""In a source: what it was built from, and what was left out or changed, in numbers."""
LEFT_OUT_NAME = "left_out.jsonl"
"""In a source: name and cause of everything that was left out."""
_REQUEST_NAME = "request.json"


@contextmanager
def building(destination: Path, source: str) -> Iterator[Path]:
    """The folder for building a source of the corpus at `destination`; kept if the build fails.

    Raises:
        ValueError: another process builds a source of this corpus.
    """
    folder = destination.parent / f".{destination.name}-building"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{destination}: another process builds a source of it; wait for its end"
            ) from error
        work = folder / source
        work.mkdir(exist_ok=True)
        yield work
        shutil.rmtree(work)
    finally:
        for path in (folder / source, folder):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        os.close(handle)


def check_request(work: Path, fields: Mapping[str, Any]) -> None:
    """Note what is built in this folder, or compare it with the note.

    Raises:
        ValueError: names the options that were others when the build began.
    """
    path = work / _REQUEST_NAME
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = json.loads(json.dumps(fields))
    problems = [
        f"--{name.replace('_', '-')}={now[name]}: was {before[name]}"
        if name != "inputs"
        else "the files or rows, or their sizes, are not those that it began with"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if problems:
        raise ValueError(
            f"{work}: half built with other options or files; go on with the same ones, or remove "
            "that folder\n" + "\n".join(problems)
        )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**before, **now}, indent=1) + "\n")
    partial.replace(path)


def collect(job: ChunkJob, folder: Path, request: Mapping[str, Any]) -> None:
    """Put the finished chunks together as one source; may be interrupted and called again.

    Raises:
        ValueError: no documents at all, or none in a split.
    """
    chunks = sorted(path for path in job.folder.iterdir() if path.name[0] != ".")
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    with (folder / LEFT_OUT_NAME).open("w", encoding="utf-8") as file:
        for chunk in chunks:
            report = json.loads((chunk / REPORT_NAME).read_text())
            counts.update({name: report[name] for name in ("cut", "renamed")})
            for name, cause in report["left_out"]:
                left_out[cause] += 1
                file.write(json.dumps({"name": name, "cause": cause}, ensure_ascii=False) + "\n")
    manifests = {split: _gather(chunks, split) for split in job.splits}
    _require_documents(job, manifests, left_out)
    for split, found in manifests.items():
        _move_shards(found, folder if split == WITHOUT_SPLITS else folder / split)
    about = {"request": request, **counts, "left_out": dict(sorted(left_out.items()))}
    (folder / IMPORT_NAME).write_text(json.dumps(about, indent=1) + "\n")


def _gather(chunks: list[Path], split: str) -> list[tuple[Path, Manifest]]:
    """The folders of a split in the chunks, with their manifests."""
    folders = [chunk / split for chunk in chunks if (chunk / split).is_dir()]
    return [(folder, Manifest.read(folder, key=str(folder))) for folder in folders]


def _require_documents(
    job: ChunkJob, manifests: Mapping[str, list[tuple[Path, Manifest]]], left_out: Counter[str]
) -> None:
    for split, found in manifests.items():
        if found:
            continue
        if not any(manifests.values()):
            causes = ", ".join(f"{number} {cause}" for cause, number in left_out.most_common())
            raise ValueError(f"--source={job.source}: no documents; left out: {causes}")
        raise ValueError(
            f"--held-out={job.held_out}: no document falls to {split}, there are too few; remove "
            f"{job.folder.parent}, then use a share nearer to 0.5, or --held-out 0 for a source "
            "without splits"
        )


def _move_shards(found: list[tuple[Path, Manifest]], folder: Path) -> None:
    """Number the shards of all chunks through, and write their common manifest."""
    folder.mkdir(exist_ok=True)
    entries: list[ShardEntry] = []
    for chunk, manifest in found:
        for entry in manifest.shards:
            name = f"shard-{len(entries):06d}.tar"
            for old, new in (
                (chunk / entry.name, folder / name),
                (index_path(chunk / entry.name), index_path(folder / name)),
            ):
                if old.exists():  # else it was moved before an interruption
                    old.rename(new)
            entries.append(replace(entry, name=name))
    replace(found[0][1], shards=tuple(entries)).write(folder)
