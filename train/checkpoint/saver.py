"""Saves checkpoints, behind the next steps of training if the recipe says so; called by `train.loop`.

A save of `checkpoint.asynchronous` holds training up only while the state is copied to host memory. A
thread writes, hashes and commits the copy; what it has to say to other ranks goes over a group of its
own, for no two threads may use one group. There is one save at a time: the next one waits for it.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from parallel.engram_chain import Manifest
from parallel.engram_saves import Taken
from train.checkpoint.commit import begin, checkpoint_path, commit, remove_old
from train.checkpoint.files import HashingWriter
from train.checkpoint.manifest import FileHash, sync
from train.checkpoint.staging import Stage
from train.checkpoint.state import Progress, state_of, write_meta
from train.checkpoint.together import SaveError, describe, together
from train.training import Training

_GRACE_SECONDS = 20.0
"""For a save that is under way when training fails: it is of a step before the failure."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint that was committed."""

    path: Path
    step: int
    blocked_seconds: float
    """For which training was held up."""
    total_seconds: float
    """Until the commit."""


@dataclass(frozen=True)
class _Snapshot:
    """What is saved; nobody changes it until it is."""

    state: dict[str, Any]
    taken: Taken | None
    progress: Progress
    reason: str | None
    started: float
    blocked_seconds: float | None = None
    """None: training waits until all is done."""


class CheckpointSaver:
    """Saves what a rank trains; all ranks make the same calls. A context manager.

    Args:
        training: whose state is saved, by the rules of its recipe.
        run_dir: the run.
        corpus: fingerprint of the corpus.
        committed: called on rank 0 after each commit, in the thread that writes, with the reason
            that the save was given.
    """

    def __init__(
        self,
        training: Training,
        run_dir: Path,
        *,
        corpus: str,
        committed: Callable[[Committed, str | None], None] = lambda found, reason: None,
    ) -> None:
        self._training, self._run_dir, self._corpus = training, run_dir, corpus
        self._committed = committed
        self._group = training.save_group
        self._stage = Stage(
            pinned=training.backend.capabilities.pinned_memory,
            synchronize=training.backend.synchronize,
        )
        self._running: _Background | None = None

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed here; other ranks may not know yet."""
        return self._running is not None and self._running.error is not None

    def save(self, progress: Progress, reason: str | None = None) -> None:
        """Save the state after `progress.step`, after the save before.

        Communication: that of a save, over a group of its own: DCP's planning gathers, four gathers to
        rank 0 and, with tables, two gathers over the world. What is saved goes from each rank to its
        own files.

        Raises:
            SaveError: this save or the one before failed; on all ranks alike.
        """
        self.wait()
        started = time.perf_counter()
        training = self._training
        state = state_of(training.model, training.engine, progress, training.backend.rng_state())
        taken = training.tables.take() if training.tables else None
        snapshot = _Snapshot(state, taken, progress, reason, started)
        if training.config.checkpoint.asynchronous:
            snapshot = replace(
                snapshot,
                state=self._stage.copy(state),
                blocked_seconds=time.perf_counter() - started,
            )
            self._running = _Background(partial(self._write, snapshot))
        else:
            self._write(snapshot)

    def wait(self) -> None:
        """Return when there is no save under way.

        Raises:
            SaveError: it failed; on all ranks alike.
        """
        if self._running is None:
            return
        self._running.join()
        error, self._running = self._running.error, None
        if error is not None:
            raise error

    def check(self, failed: bool) -> None:
        """Raise what `failed` on some rank, if it did; all ranks call it between two steps.

        Raises:
            SaveError: it did.
        """
        if failed:
            self.wait()
            raise SaveError("a checkpoint was not saved: see the logs of the other ranks")

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif self._running is not None:
            self._running.join(_GRACE_SECONDS)

    def _write(self, snapshot: _Snapshot) -> None:
        """Write and commit it, then drop old checkpoints."""
        step = snapshot.progress.step
        try:
            self._write_files(snapshot)
        except BaseException as error:  # DCP's exceptions are none of `Exception`
            message = f"the checkpoint of step {step} was not saved:\n{describe(error)}"
            raise SaveError(message) from error
        if dist.get_rank() == 0:
            total, blocked = time.perf_counter() - snapshot.started, snapshot.blocked_seconds
            found = Committed(
                path=checkpoint_path(self._run_dir, step),
                step=step,
                blocked_seconds=total if blocked is None else blocked,
                total_seconds=total,
            )
            self._committed(found, snapshot.reason)

    def _write_files(self, snapshot: _Snapshot) -> None:
        step, tables = snapshot.progress.step, self._training.tables
        final = checkpoint_path(self._run_dir, step)
        temporary = final.with_suffix(".tmp")
        first = dist.get_rank() == 0
        together(self._group, lambda: begin(self._run_dir, step) if first else None)
        writer = HashingWriter(temporary)
        save_distributed(snapshot.state, storage_writer=writer, process_group=self._group)
        rows = tables.write(temporary, step, snapshot.taken) if tables else None
        together(
            self._group,
            lambda: writer.written,
            lambda found: self._commit(temporary, snapshot.progress, list(chain(*found)), rows),
        )
        if tables:
            tables.committed(final, step)

    def _commit(
        self,
        temporary: Path,
        progress: Progress,
        written: list[FileHash],
        rows: Manifest | None,
    ) -> None:
        """On rank 0: the rest of the files, the commit, and what goes with it."""
        if self._training.tables:
            written = written + self._training.tables.seal(temporary, rows)
        write_meta(
            temporary,
            step=progress.step,
            tokens=progress.tokens,
            corpus=self._corpus,
            world_size=dist.get_world_size(),
        )
        with suppress(FileNotFoundError):  # the records of these steps are not lost before it is
            sync(self._run_dir / "metrics.jsonl")
        commit(temporary, written)
        rules = self._training.config.checkpoint
        remove_old(self._run_dir, rules.keep_last, rules.keep_every_steps)


class _Background(threading.Thread):
    """Does a job while training goes on."""

    def __init__(self, job: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._job = job
        self.error: BaseException | None = None
        """Why it failed; None as long as it has not."""
        torch.get_num_threads()  # this thread's count is settled before the new thread's
        self.start()

    def run(self) -> None:
        """Do it; `CheckpointSaver.wait` raises what it raised."""
        torch.set_num_threads(1)  # as in `parallel.engram_thread`
        try:
            self._job()
        except BaseException as error:
            self.error = error
        finally:
            del self._job  # and the rows that it holds
