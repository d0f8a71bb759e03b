"""The files of a run directory that the launcher writes, and the state that it reports.

`launch.start` and `launch.local` use this. What ranks write (metrics, events, checkpoints) is only
looked at. No torch.
"""

import fcntl
import json
import os
import platform
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from train.checkpoint.commit import newest_checkpoint
from train.config import RunConfig
from train.recipe import save_resolved

_PACKAGES = (
    *("mneme", "torch", "numpy", "megatron-core", "deepspeed", "webdataset", "datasets"),
    *("tokenizers", "hydra-core", "pydantic", "wandb", "tensorboard"),
)
_TAIL_BYTES = 1 << 16

_BEAT_SECONDS = 5.0
"""Between two signs of life of a launcher."""
_ALIVE_SECONDS = 30.0
"""A launcher on another machine that has given none for so long is gone; clocks may differ a little."""

_LOCK_SECONDS = 0.5
"""Longer than `is_held` of another process keeps the lock that it tries."""


class RunDirError(ValueError):
    """A run directory cannot be used for what was asked; says what to type instead."""


def run_name(recipe: str) -> str:
    """A name for a new run of a recipe."""
    return f"{recipe}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def new_run_dir(name: str, requested: Path | None) -> Path:
    """Create the directory of a new run: `requested`, or `runs/<name>-<time>-<random>`.

    Raises:
        RunDirError: it exists and is not empty, or is a file.
    """
    run_dir = requested or Path("runs") / run_name(name)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        use = f"`mneme resume {run_dir}`, or " if (run_dir / "recipe.yaml").is_file() else ""
        raise RunDirError(f"--run-dir {run_dir}: exists and is not empty; use {use}another name")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def write_recipe(run_dir: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Write `recipe.yaml` and add to `overrides.txt`; an older recipe is kept beside it.

    The older one becomes `recipe.attempt-N.yaml`, N being the attempt that ran with it.
    """
    path = run_dir / "recipe.yaml"
    if path.exists():
        path.replace(run_dir / f"recipe.attempt-{next_attempt(run_dir) - 1}.yaml")
    save_resolved(config, path)
    with (run_dir / "overrides.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{override}\n" for override in overrides)


def write_environment(run_dir: Path) -> None:
    """Write `env.json`: what a reader needs to repeat the run elsewhere."""
    environment = {
        "attempt": next_attempt(run_dir),
        "time": time.time(),
        "argv": sys.argv,
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "git": _git_state(),
    }
    text = json.dumps(environment, indent=2)
    (run_dir / "env.json").write_text(text + "\n", encoding="utf-8")


def started_in(run_dir: Path) -> Path | None:
    """Working directory of the newest attempt, to which relative paths of its recipe refer."""
    try:
        environment = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))
        return Path(environment["directory"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that runs, and whether it has changes; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def next_attempt(run_dir: Path) -> int:
    """Number of the attempt that is about to start, from 1: each has its own folder of logs."""
    return max(map(_attempt_number, run_dir.glob("logs/attempt-*")), default=0) + 1


def last_attempt_logs(run_dir: Path) -> Path | None:
    """The logs of the newest attempt."""
    return max(run_dir.glob("logs/attempt-*"), key=_attempt_number, default=None)


def _attempt_number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def last_record(run_dir: Path) -> dict[str, Any] | None:
    """The last whole record of `metrics.jsonl`; reads the end of the file only."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return dict(json.loads(lines[-1])) if lines else None


def progress(run_dir: Path) -> dict[str, Any]:
    """Step, tokens and newest checkpoint, as in `status.json`."""
    record = last_record(run_dir) or {}
    newest = newest_checkpoint(run_dir)
    return {
        "step": record.get("step", 0),
        "tokens": record.get("tokens", 0),
        "last_checkpoint": str(newest[1].relative_to(run_dir)) if newest else None,
    }


def write_status(run_dir: Path, *, state: str, reason: str, ranks: int) -> None:
    """Replace `status.json`.

    Args:
        run_dir: the run.
        state: running, done, stopped or failed.
        reason: why it is in that state, for a person.
        ranks: number of ranks of the attempt.
    """
    status = {"state": state, **progress(run_dir), "reason": reason, "ranks": ranks}
    temporary = run_dir / "status.json.tmp"
    temporary.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run_dir / "status.json")


@contextmanager
def held(run_dir: Path, *, patience_seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """Keep other launchers out of a run while this block runs; ends with the process, if not before.

    The lock says on which machine it is held, and its file is touched now and then: file systems
    that several machines see may keep locks to one of them.

    Raises:
        RunDirError: another launcher has it, and keeps it for `patience_seconds`.
    """
    path = run_dir / ".lock"
    with path.open("a") as lock:
        deadline = time.monotonic() + patience_seconds
        while _is_held_elsewhere(path) or not _locks(lock):
            if time.monotonic() > deadline:
                where = f" on {_holder(path)}" if _is_held_elsewhere(path) else ""
                raise RunDirError(
                    f"{run_dir}: is being trained by another mneme process{where}; wait for it, or "
                    "stop it with Ctrl-C"
                )
            time.sleep(0.05)
        lock.truncate(0)
        lock.write(platform.node())
        lock.flush()
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            lock.truncate(0)


def is_held(run_dir: Path) -> bool:
    """Whether a launcher is at work in the run, here or on another machine."""
    path = run_dir / ".lock"
    if _is_held_elsewhere(path):
        return True
    try:
        with path.open() as lock:
            return not _locks(lock)
    except FileNotFoundError:
        return False


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(_BEAT_SECONDS):
        path.touch()


def _holder(path: Path) -> str:
    """The machine on which a launcher has the run, or had it when it was killed; "" for none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _is_held_elsewhere(path: Path) -> bool:
    if _holder(path) in ("", platform.node()):
        return False
    return time.time() - path.stat().st_mtime < _ALIVE_SECONDS


def _locks(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
