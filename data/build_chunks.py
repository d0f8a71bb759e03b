"""Cuts an importer's items into chunks and has processes write them; a chunk is whole or not there.

A killed build goes on with the chunks that are missing, and ends with the same bytes: what is in
a chunk depends on the items and the options, never on the number of processes.
"""

import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import islice
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from data.build_chunk import Chunk, ChunkJob, write_chunk
from data.importers.drafts import Importer
from data.processes import start_worker


@dataclass(frozen=True, slots=True)
class Plan:
    """How the items of a source are cut."""

    chunks: tuple[Chunk, ...]
    digest: str
    """Of the keys and sizes of all items: another digest, other files."""

    @property
    def bytes(self) -> int:
        """Of all items."""
        return sum(chunk.bytes for chunk in self.chunks)


def plan_chunks(importer: Importer, *, max_bytes: int, limit: int | None) -> Plan:
    """List the items once; 16 bytes of memory for each, for finding keys that come again.

    Args:
        importer: whose items.
        max_bytes: of a chunk, unless one item is larger.
        limit: take this many items; None: all.
    """
    hashes: list[np.ndarray] = []
    bounds: list[tuple[int, int]] = []  # after the last item, bytes
    digest = sha256()
    stop, size = 0, 0
    items = islice(importer.items(), limit)
    while batch := list(islice(items, 65536)):
        raw = [blake2b(key.encode(), digest_size=8).digest() for key, _ in batch]
        hashes.append(np.frombuffer(b"".join(raw), np.uint64))
        digest.update(b"".join(raw))
        digest.update(np.array([item_bytes for _, item_bytes in batch], np.uint64).tobytes())
        for _, item_bytes in batch:
            if size and size + item_bytes > max_bytes:
                bounds.append((stop, size))
                size = 0
            stop, size = stop + 1, size + item_bytes
    if stop:
        bounds.append((stop, size))
    again = _keys_again(np.concatenate([*hashes, np.empty(0, np.uint64)]))
    starts = [0, *(stop for stop, _ in bounds)]
    chunks = tuple(
        Chunk(
            number=number,
            start=start,
            stop=stop,
            bytes=size,
            again=tuple(again[bisect_left(again, (start,)) : bisect_left(again, (stop,))]),
        )
        for number, (start, (stop, size)) in enumerate(zip(starts, bounds, strict=False))
    )
    return Plan(chunks, digest.hexdigest())


def _keys_again(hashes: np.ndarray) -> list[tuple[int, ...]]:
    """Items whose key came before: (item, how often the key came by then)."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    times: Counter[int] = Counter()
    found: list[tuple[int, ...]] = []
    for place in same:
        times[int(hashes[order[place]])] += 1
        found.append((int(order[place]), 1 + times[int(hashes[order[place]])]))
    return sorted(found)


def write_chunks(job: ChunkJob, chunks: Sequence[Chunk], *, processes: int, progress: bool) -> None:
    """Write the chunks that are not there yet below `job.folder`.

    With fewer chunks than processes, the processes that are left encode inside a chunk.

    Raises:
        ValueError, RuntimeError, OSError: what a chunk met first; the others stay written.
    """
    job.folder.mkdir(exist_ok=True)
    for left in job.folder.glob(".*"):  # of processes that were killed
        shutil.rmtree(left)
    missing = [chunk for chunk in chunks if not job.chunk_folder(chunk).exists()]
    workers = max(1, min(processes, len(missing)))
    with tqdm(
        desc=f"build {job.source}",
        total=sum(chunk.bytes for chunk in chunks),
        initial=sum(chunk.bytes for chunk in chunks) - sum(chunk.bytes for chunk in missing),
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for chunk in _written(job, missing, workers, processes // workers):
            bar.update(chunk.bytes)


def _written(
    job: ChunkJob, chunks: Sequence[Chunk], workers: int, encoders: int
) -> Iterator[Chunk]:
    """Yield each chunk when it has been written."""
    if workers == 1:
        for chunk in chunks:
            write_chunk(job, chunk, encoders)
            yield chunk
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (job,)) as pool:
        waiting = iter(chunks)
        running: dict[Future[None], Chunk] = {}
        try:
            while True:
                for chunk in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(_write_in_worker, chunk, encoders)] = chunk
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        finally:
            pool.shutdown(cancel_futures=True)


_job: ChunkJob | None = None  # of a worker process


def _start_worker(job: ChunkJob) -> None:
    global _job  # noqa: PLW0603 - sent once, not with each chunk
    _job = job
    start_worker()


def _write_in_worker(chunk: Chunk, encoders: int) -> None:
    assert _job is not None
    write_chunk(_job, chunk, encoders)
