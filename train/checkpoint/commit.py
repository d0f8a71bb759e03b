"""The commit protocol of checkpoints: a new directory, written beside, renamed when whole.

A checkpoint is the directory `checkpoints/step-00000100`. It is written as `step-00000100.tmp`, its
manifest last, and everything is durable before the rename, which is the commit: a name without
suffix is always whole. Nothing is ever written into an existing checkpoint. No torch here: the
launcher looks for checkpoints too.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.manifest import FileHash, obstacle, seal, sync

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp"
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class Skipped:
    """Something under `checkpoints/` that a run does not resume from."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """Where a run resumes."""

    newest: tuple[int, Path] | None
    """Step and path of the newest checkpoint that is whole; None: at the start of the run."""
    damaged: tuple[Skipped, ...]
    """Newer checkpoints that are not whole any more."""
    leftovers: tuple[Skipped, ...]
    """What a kill left: never were checkpoints, or were about to be removed."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of optimizer step `step` lives once it is committed."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints as (step, path), oldest first."""
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """The last committed checkpoint as (step, path)."""
    found = complete_checkpoints(run_dir)
    return found[-1] if found else None


def choose(run_dir: Path) -> Choice:
    """Where to resume: the newest checkpoint whose manifest is there and whose files have their sizes.

    Raises:
        ValueError: there are checkpoints, and none is whole; says what is wrong with each.
    """
    newest, damaged = None, []
    for step, path in reversed(complete_checkpoints(run_dir)):
        reason = obstacle(path)
        if reason is None:
            newest = (step, path)
            break
        damaged.append(Skipped(path, reason))
    if damaged and newest is None:
        lines = "\n".join(f"  {skipped}" for skipped in damaged)
        raise ValueError(
            f"{run_dir}: no checkpoint is whole:\n{lines}\nput back what is missing "
            f"(`mneme checkpoint verify {run_dir}` names all of it), or start a new run"
        )
    leftovers = sorted((run_dir / "checkpoints").glob(f"step-*{_TEMPORARY}"))
    reason = "left by a save or a removal that was cut short"
    return Choice(newest, tuple(damaged), tuple(Skipped(path, reason) for path in leftovers))


def clean_up(run_dir: Path, choice: Choice) -> None:
    """Remove what a kill left, and give the names of damaged checkpoints free; nothing of them is lost.

    Nothing under a name that ends in `.tmp` is part of a checkpoint. A damaged one keeps its files as
    `step-00000100.damaged`, so that the run can save that step again.
    """
    for skipped in choice.damaged:
        aside = skipped.path.with_suffix(_DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)  # of the same step, from before
        skipped.path.rename(aside)
    for path in (run_dir / "checkpoints").glob(f"*{_TEMPORARY}"):
        shutil.rmtree(path)


def holds_only_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint was imported: training starts from it at step 0, nothing else restored."""
    meta = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    return bool(meta.get("only_weights", False))


def begin(run_dir: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; leftovers of a kill are removed."""
    temporary = checkpoint_path(run_dir, step).with_suffix(_TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sync(run_dir)  # the name `checkpoints`
    return temporary


def commit(temporary: Path, written: Iterable[FileHash] = ()) -> Path:
    """Make the checkpoint under `temporary` the committed one; durable when this returns.

    Args:
        temporary: its directory, of `begin`.
        written: hashes of files that were hashed, and made durable, as they were written.

    Raises:
        OSError: one of these is not here, or something cannot be written.
    """
    final = temporary.with_suffix("")
    seal(temporary, written)
    temporary.rename(final)
    sync(final.parent)
    return final


def remove_old(run_dir: Path, keep_last: int, keep_every_steps: int = 0) -> None:
    """Remove all but the newest `keep_last` checkpoints, never leaving half of one under its name.

    Args:
        run_dir: the run.
        keep_last: at least 1.
        keep_every_steps: checkpoints of multiples of this step stay, too; 0: none.
    """
    for step, path in complete_checkpoints(run_dir)[:-keep_last]:
        if keep_every_steps and step % keep_every_steps == 0:
            continue
        doomed = path.with_suffix(_TEMPORARY)
        path.rename(doomed)
        shutil.rmtree(doomed)
