"""The commit protocol of checkpoints: a new directory, written beside, renamed when whole.

A checkpoint is the directory `checkpoints/step-00000100`. It is written as `step-00000100.tmp`;
the rename is the commit, so a name without suffix is always whole. Nothing is ever written into an
existing checkpoint. No torch here: the launcher looks for checkpoints too.
"""

import json
import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})")


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


def holds_only_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint was imported: training starts from it at step 0, nothing else restored."""
    meta = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    return bool(meta.get("only_weights", False))


def begin(run_dir: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; leftovers of a kill are removed."""
    temporary = checkpoint_path(run_dir, step).with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a kill left: nothing under a name that ends in `.tmp` is part of a checkpoint."""
    for path in (run_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(path)


def commit(temporary: Path) -> Path:
    """Make the checkpoint under `temporary` the committed one; durable when this returns."""
    final = temporary.with_suffix("")
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)
    return final


def remove_old(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, never leaving half of one under its name."""
    for _, path in complete_checkpoints(run_dir)[:-keep_last]:
        doomed = path.with_suffix(".tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
