"""Saves of Engram's tables: what changed since the last save, and now and then everything.

`train.checkpoint` calls it: `take` between two steps, the rest of a save from another thread, while
training goes on. A save writes the rows that changed since the last one and links the older files of
the chain (see `engram_chain`), which never change: each checkpoint directory is whole by itself, and
costs what is new in it.

When a chain has many files, or holds many rows more than once, a thread writes a new base from the
live tables while training goes on. What it reads of a row that changes meanwhile is worthless, but
that row is in the next save: base and saves since it was begun are consistent, without a copy of the
table. It takes the place of the older files in the first save after all ranks have theirs.

Rows are numbered within their layers, so any number of ranks, with any layers, reads a chain, and
goes on with it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.engram_chain import (
    FOLDER,
    ArrayTypes,
    Generation,
    Manifest,
    link_file,
    read_manifest,
)
from parallel.engram_dirty import DirtyRows
from parallel.engram_files import FileEntry, RowFile, TablePlace, as_records, check_file
from parallel.engram_rows import Marks
from parallel.engram_write import (
    BackgroundWriter,
    Section,
    copy_rows_of,
    sections_of,
    write_file,
)

SCRATCH = "engram-base.tmp"
"""Beside the checkpoints: bases that are not whole. What a run finds there when it starts is worthless."""

T = TypeVar("T")


@runtime_checkable
class Store(Protocol):
    """The rows of a rank; `parallel.engram_rows.RowStore`."""

    arrays: dict[str, NDArray[Any]]
    trackers: list[Marks]

    def prefault(self, local: NDArray[np.int64]) -> None:
        """Ask for the memory of rows ahead of their use."""


@runtime_checkable
class Jobs(Protocol):
    """The thread that owns a store; `parallel.engram_service.TableService`."""

    def submit(self, job: Callable[[Any], T]) -> "Future[T]":
        """Call `job(store)` between two updates."""


@dataclass(frozen=True)
class Taken:
    """The changes of this rank up to a step."""

    sections: "Future[list[Section]] | None"
    """With copies of the rows; None without tables."""
    base_is_whole: bool
    """If there is a new base, it holds nothing of later steps: its last row was read before."""


@dataclass(frozen=True)
class _Save:
    """A save that all ranks are ready for."""

    folder: Path
    step: int
    sections: list[Section]
    """The changes of this rank."""
    kept: tuple[Generation, ...]
    """What stays of the chain."""
    base: FileEntry | None = None
    """This rank's file of a new base."""
    base_step: int | None = None
    """When the new base was begun; None without a new base."""


@dataclass(frozen=True)
class _Answer:
    """What a rank tells the others at the end of a save."""

    problems: tuple[str, ...]
    layers: dict[int, int]
    arrays: ArrayTypes
    changes: FileEntry | None
    base: FileEntry | None
    touched: int
    """Rows that ever changed."""


class TableSaver:
    """Saves and restores the rows of one rank; all ranks of the world make the same calls.

    Args:
        jobs: the service of this rank's tables; None on a rank of a stage without tables.
        tables: of this rank's group, in the order of their first rows.
        rank: in the group.
        ranks: of the group.
        group: all ranks of the world, for this saver alone; None: the default one.
        max_saves: in a chain before a new base is begun: a reader looks into so many files.
        max_extra: rows that a chain holds more than once, over all that ever changed, likewise.
    """

    def __init__(
        self,
        jobs: Jobs | None,
        tables: Sequence[TablePlace],
        *,
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None = None,
        max_saves: int = 16,
        max_extra: float = 0.5,
    ) -> None:
        self._jobs, self._tables = jobs, tuple(tables)
        self._rank, self._ranks, self._group = rank, ranks, group
        self._max_saves, self._max_extra = max_saves, max_extra
        num_rows = sum(len(table.held(rank, ranks)) for table in tables)
        self._dirty, self._touched = DirtyRows(num_rows), DirtyRows(num_rows)
        self._chain: tuple[Generation, ...] = ()
        self._source = Path()
        """Where the files of the chain are."""
        self._base_is_due = False
        self._base_step: int | None = None
        """Last save before the base was begun that is being written; the same on all ranks."""
        self._base: BackgroundWriter | None = None
        self._arrays: ArrayTypes = jobs.submit(self._attach).result() if jobs else {}

    def take(self) -> Taken:
        """Let the rows that changed since the last save be copied, between two updates.

        A save has to follow, before the next call: the copies are all that knows of these changes.
        """
        whole = self._base is None or self._base.entry is not None
        return Taken(self._jobs.submit(self._take_changes) if self._jobs else None, whole)

    def write(self, directory: Path, step: int, taken: Taken) -> Manifest:
        """Write the files of a save; with its manifest, the directory may be committed then.

        Communication: two gathers over the world.

        Args:
            directory: of the checkpoint, not yet committed.
            step: optimizer steps so far.
            taken: what changed up to that step.

        Returns:
            What the save holds, of all ranks; the same everywhere.

        Raises:
            RuntimeError: the tables or the base of some rank have failed, or it could not write; on
                all ranks alike.
        """
        save = self._prepare(directory / FOLDER, step, taken)
        answers = self._gather(self._complete(save))
        _raise_all(problem for answer in answers for problem in answer.problems)
        chain = list(save.kept)
        if save.base_step is not None:
            files = tuple(answer.base for answer in answers if answer.base)
            chain.insert(0, Generation("base", save.base_step, files))
            self._base, self._base_step = None, None
        if files := tuple(answer.changes for answer in answers if answer.changes):
            chain.append(Generation("save", save.step, files))
        self._chain = tuple(chain)
        layers = dict(sorted(item for answer in answers for item in answer.layers.items()))
        arrays = next(answer.arrays for answer in answers if answer.arrays)
        self._plan_base(sum(answer.touched for answer in answers))
        return Manifest(layers=layers, arrays=arrays, chain=self._chain)

    def committed(self, checkpoint: Path, step: int) -> None:
        """Take note that a save is committed as `checkpoint`; begin a new base if it is time."""
        self._source = checkpoint / FOLDER
        if self._base_is_due and self._base_step is None:
            self._base_step = step
            if self._jobs:
                self._base = self._jobs.submit(self._begin_base).result()

    def restore(self, checkpoint: Path) -> None:
        """Read the rows of this rank from the chain of a checkpoint; they must be zeros before.

        Every file is read and its hash compared by one rank, before any rank reads a row.

        Communication: a gather over the world.

        Raises:
            ValueError: the manifest is of other tables, or a file is missing or not the one that was
                written; names each, on all ranks alike.
        """
        self._source = checkpoint / FOLDER
        manifest = read_manifest(self._source)
        rank, world = dist.get_rank(), dist.get_world_size()
        found = [check_file(self._source, entry) for entry in manifest.entries[rank::world]]
        found += self._differences(manifest)
        problems = {
            problem: None for answer in self._gather(found) for problem in answer if problem
        }
        if problems:
            raise ValueError("\n".join(problems))
        self._chain = manifest.chain
        touched = self._jobs.submit(self._read_chain).result() if self._jobs else 0
        self._plan_base(sum(self._gather(touched)))

    def close(self) -> None:
        """Give up a base that is being written; the store may be closed afterwards."""
        if self._base:
            self._base.stop()
            with suppress(OSError):  # others may have files in it
                self._base.path.parent.rmdir()

    def _attach(self, store: Store) -> ArrayTypes:
        store.trackers.append(self._dirty)
        return {name: (a.dtype.name, a.shape[1:]) for name, a in store.arrays.items()}

    def _take_changes(self, store: Store) -> list[Section]:
        rows = self._dirty.take()
        self._touched.mark(rows)
        sections = sections_of(self._tables, self._rank, self._ranks, rows)
        return copy_rows_of(store.arrays, sections)

    def _prepare(self, folder: Path, step: int, taken: Taken) -> _Save:
        """Find out whether all ranks can save, and whether all have their part of a new base."""
        sections, problem = [], ""
        try:
            folder.mkdir(exist_ok=True)
            if taken.sections:
                sections = taken.sections.result()
            if self._base and self._base.error:
                raise self._base.error
        except Exception as error:  # all ranks raise it
            problem = _describe(error)
        answers = self._gather((problem, taken.base_is_whole))
        _raise_all(problem for problem, _ in answers)
        if self._base_step is None or not all(whole for _, whole in answers):
            return _Save(folder, step, sections, self._chain)
        since = [g for g in self._chain if g.kind == "save" and g.step > self._base_step]
        base = self._base.entry if self._base else None
        return _Save(folder, step, sections, tuple(since), base, self._base_step)

    def _complete(self, save: _Save) -> _Answer:
        """Write this rank's files, and put its share of the older ones into the folder."""
        changes, base, problems = None, None, []
        try:
            if save.sections:
                path = save.folder / _file_name("save", save.step)
                arrays = save.sections[0].copies
                assert arrays is not None, "made by `take`"
                changes = write_file(path, arrays, save.sections)
            if self._base and save.base:
                base = replace(save.base, name=_file_name("base", save.step))
                self._base.path.rename(save.folder / base.name)
            kept = [entry.name for generation in save.kept for entry in generation.files]
            for name in kept[dist.get_rank() :: dist.get_world_size()]:
                link_file(self._source / name, save.folder / name)
        except Exception as error:  # all ranks raise it
            problems.append(_describe(error))
        layers = {table.layer: table.num_rows for table in self._tables}
        return _Answer(tuple(problems), layers, self._arrays, changes, base, len(self._touched))

    def _gather(self, value: T) -> list[T]:
        """The values of all ranks of the world."""
        found: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return cast("list[T]", found)

    def _plan_base(self, touched: int) -> None:
        """Decide whether a new base is due, from numbers that all ranks know."""
        saves = sum(generation.kind == "save" for generation in self._chain)
        extra = sum(generation.rows for generation in self._chain) - touched
        self._base_is_due = saves >= self._max_saves or extra > self._max_extra * touched

    def _begin_base(self, store: Store) -> BackgroundWriter | None:
        size = sum(as_records(array).dtype.itemsize for array in store.arrays.values())
        rows = None
        if len(self._touched) * (size + 8) < self._touched.num_rows * size:
            rows = self._touched.rows()  # with their numbers, still the smaller file
        sections = sections_of(self._tables, self._rank, self._ranks, rows)
        if not sections:
            return None
        scratch = self._source.parents[1] / SCRATCH
        scratch.mkdir(exist_ok=True)
        path = scratch / f"{dist.get_rank():05d}"
        return BackgroundWriter(path, dict(store.arrays), sections, ahead=store.prefault)

    def _differences(self, manifest: Manifest) -> list[str]:
        """Why the rows of a chain are not those of this rank's tables."""
        problems = [
            f"{self._source}: layer {table.layer} has {rows or 'no'} rows, not {table.num_rows}"
            for table in self._tables
            if (rows := manifest.layers.get(table.layer)) != table.num_rows
        ]
        if self._arrays and self._arrays != manifest.arrays:
            problems.append(f"{self._source}: rows are {manifest.arrays}, not {self._arrays}")
        return problems

    def _read_chain(self, store: Store) -> int:
        for entry in (entry for generation in self._chain for entry in generation.files):
            file = RowFile(self._source, entry)
            for table in self._tables:
                for rows in file.copy_rows(table, self._rank, self._ranks, store.arrays):
                    self._touched.mark(rows)
        return len(self._touched)


def _file_name(kind: str, step: int) -> str:
    return f"{kind}-{step:08d}-{dist.get_rank():05d}.safetensors"


def _describe(error: Exception) -> str:
    return f"rank {dist.get_rank()}: {type(error).__name__}: {error}"


def _raise_all(problems: Any) -> None:  # noqa: ANN401
    """Raise what some ranks have found, on all ranks."""
    if found := [problem for problem in problems if problem]:
        raise RuntimeError("Engram tables were not saved:\n" + "\n".join(found))
