"""Small runs that train and save Engram tables without a model: every row's value is a formula."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from parallel import engram_files, engram_write
from parallel.engram_chain import FOLDER, read_manifest, write_manifest
from parallel.engram_dirty import DirtyRows
from parallel.engram_files import TablePlace
from parallel.engram_rows import Marks
from parallel.engram_saves import TableSaver, Taken
from train.checkpoint.commit import (
    Choice,
    begin,
    checkpoint_path,
    clean_up,
    commit,
    newest_checkpoint,
    remove_old,
)

ROWS = {1: 301, 3: 257, 5: 411}
"""Of each layer's table."""
WIDTH = 4
Layers = dict[int, dict[str, NDArray[Any]]]


def blank(num_rows: int) -> dict[str, NDArray[Any]]:
    return {
        "rows": np.zeros((num_rows, WIDTH), np.float32),
        "exp_avg": np.zeros((num_rows, WIDTH), np.float32),
        "steps": np.zeros(num_rows, np.int32),
        "code": np.zeros(num_rows, np.uint8),
    }


def touched(layer: int, step: int) -> NDArray[np.int64]:
    """Rows of a layer that a step changes: a few of them in every step."""
    picked = np.random.default_rng([layer, step]).random(ROWS[layer]) ** 4 * ROWS[layer]
    return np.unique(picked[:60].astype(np.int64))


def change(arrays: dict[str, NDArray[Any]], at: NDArray[np.int64], row: NDArray[np.int64]) -> None:
    """Update rows in place; what becomes of one depends on its number and its values."""
    arrays["steps"][at] += 1
    arrays["code"][at] = (row + arrays["steps"][at]) % 251
    gradient = np.sin(row[:, None] + np.arange(WIDTH) + arrays["rows"][at], dtype=np.float32)
    arrays["exp_avg"][at] = 0.9 * arrays["exp_avg"][at] + 0.1 * gradient
    arrays["rows"][at] -= arrays["exp_avg"][at]


def after(steps: int) -> Layers:
    """All tables after a number of steps, by one rank that never stops."""
    layers = {layer: blank(num_rows) for layer, num_rows in ROWS.items()}
    for step in range(1, steps + 1):
        for layer, arrays in layers.items():
            rows = touched(layer, step)
            change(arrays, rows, rows)
    return layers


class Store:
    """The rows of one rank."""

    def __init__(self, tables: Sequence[TablePlace], rank: int, ranks: int) -> None:
        self.tables, self.rank, self.ranks = tables, rank, ranks
        self.arrays = blank(sum(len(table.held(rank, ranks)) for table in tables))
        self.trackers: list[Marks] = []

    def update(self, step: int) -> None:
        for table in self.tables:
            rows = touched(table.layer, step)
            mine = rows[(rows + table.first_row) % self.ranks == self.rank]
            local = (mine + table.first_row) // self.ranks
            change(self.arrays, local, mine)
            for tracker in self.trackers:
                tracker.mark(local)

    def prefault(self, local: NDArray[np.int64]) -> None:
        assert len(local) == 0 or 0 <= local.min() <= local.max() < len(self.arrays["rows"])

    def differences(self, steps: int) -> int:
        """Rows that are not what they should be after a number of steps."""
        wrong, wanted = 0, after(steps)
        for table in self.tables:
            held = np.arange(table.num_rows)[table.held(self.rank, self.ranks).start :: self.ranks]
            local = (held + table.first_row) // self.ranks
            bad = np.zeros(len(held), bool)
            for name, array in self.arrays.items():
                one, other = array[local], wanted[table.layer][name][held]
                bad |= (one.view(np.uint8) != other.view(np.uint8)).reshape(len(held), -1).any(1)
            wrong += int(bad.sum())
        return wrong


class Service:
    """One thread that owns the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1)

    def submit(self, job: Callable[[Any], Any]) -> "Future[Any]":
        return self._thread.submit(job, self.store)

    def update(self, step: int) -> None:
        self.submit(lambda store: store.update(step)).result()


class Run:
    """The tables of one rank of a layout, and who saves them.

    Args:
        run_dir: of the run.
        stages: layers of each pipeline stage; the ranks of the world are divided among them.
        keys: of `TableSaver`.
    """

    def __init__(self, run_dir: Path, stages: Sequence[Sequence[int]], **keys: Any) -> None:
        self.run_dir = run_dir
        self.ranks = dist.get_world_size() // len(stages)
        stage, self.rank = divmod(dist.get_rank(), self.ranks)
        tables, first_row = [], 0
        for layer in stages[stage]:
            tables.append(TablePlace(layer, first_row, ROWS[layer]))
            first_row += ROWS[layer]
        self.store = Store(tables, self.rank, self.ranks)
        self.service = Service(self.store) if tables else None
        self.saver = TableSaver(self.service, tables, rank=self.rank, ranks=self.ranks, **keys)
        self.step = 0

    def restore(self) -> int:
        if dist.get_rank() == 0:
            clean_up(self.run_dir, Choice(None, (), ()))
        dist.barrier()
        newest = newest_checkpoint(self.run_dir)
        if newest:
            self.step = newest[0]
            self.saver.restore(newest[1])
        return self.step

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            if self.service:
                self.service.update(self.step)

    def save(
        self,
        keep_last: int = 9,
        keep_every_steps: int = 0,
        taken: tuple[int, Taken] | None = None,
    ) -> Path:
        """Save the tables as they are, or as they were taken after an earlier step."""
        step, changes = taken or (self.step, self.saver.take())
        temporary = checkpoint_path(self.run_dir, step).with_suffix(".tmp")
        if dist.get_rank() == 0:
            begin(self.run_dir, step)
        dist.barrier()
        manifest = self.saver.write(temporary, step, changes)
        if dist.get_rank() == 0:
            write_manifest(temporary / FOLDER, manifest)
            commit(temporary)
            remove_old(self.run_dir, keep_last, keep_every_steps)
        dist.barrier()
        path = checkpoint_path(self.run_dir, step)
        self.saver.committed(path, step)
        return path

    def differences(self) -> int:
        return self.store.differences(self.step)


def compile_loops() -> None:
    """Before ranks are forked, so that they need not."""
    rows = DirtyRows(1)
    rows.mark(np.zeros(1, np.int64))
    rows.take()


def kinds(checkpoint: Path) -> list[tuple[str, int]]:
    """The chain of a checkpoint."""
    return [(g.kind, g.step) for g in read_manifest(checkpoint / "engram").chain]


def write_slowly(pause: Callable[[], None], chunk_bytes: int = 256) -> None:
    """Let files be written and read in small pieces in this process, with a pause before each."""
    chunks = engram_write._chunks

    def paused(*args: Any) -> Any:
        for chunk in chunks(*args):
            pause()
            yield chunk

    patch.multiple(engram_files, CHUNK_BYTES=chunk_bytes).start()
    patch.multiple(engram_write, _chunks=paused, CHUNK_BYTES=chunk_bytes).start()
