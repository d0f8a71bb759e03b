"""The machine: Python, cores, memory, disk, shared memory, open files, clock."""

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import launch
from launch.doctor.row import Row
from launch.host import available_cores

_GIB = 1 << 30
_MIN_MEMORY = 4 * _GIB
"""The quick start takes three."""
_MIN_DISK = 5 * _GIB
"""Corpus and checkpoints of the quick start take two."""
_MIN_SHARED = 64 << 20
"""What a container has if nobody says more; too little for Engram tables in shared memory."""
_MIN_FILES = 1024
"""Shards, logs and sockets of a rank."""


def rows() -> Iterator[Row]:
    """One for each."""
    yield _python()
    yield Row(name="cores", ok=True, found=f"{available_cores()} of {os.cpu_count()}")
    yield _at_least(
        "memory",
        psutil.virtual_memory().available,
        _MIN_MEMORY,
        "close other programs, or use a smaller model or fewer ranks",
    )
    yield _at_least(
        f"disk of {Path.cwd()}",
        shutil.disk_usage(Path.cwd()).free,
        _MIN_DISK,
        "free some, or go to a directory on another disk: runs/ is made in the current one",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _shared_memory(shutil.disk_usage(shared).total)
    yield _open_files()
    yield _clock()


def _python() -> Row:
    found = f"{platform.python_version()} at {sys.executable}"
    return Row(name="python", ok=True, found=found)


def _at_least(name: str, found: int, needed: int, fix: str) -> Row:
    if found >= needed:
        return Row(name=name, ok=True, found=f"{found / _GIB:.1f} GiB free")
    return Row(
        name=name,
        ok=False,
        found=f"{found / _GIB:.1f} GiB free",
        problem=f"less than the {needed / _GIB:.0f} GiB that the quick start takes",
        fix=fix,
    )


def _shared_memory(total: int) -> Row:
    found = f"{total / _GIB:.2f} GiB"
    if total > _MIN_SHARED:
        return Row(name="shared memory (/dev/shm)", ok=True, found=found)
    return Row(
        name="shared memory (/dev/shm)",
        ok=False,
        found=found,
        problem="too little for NCCL, and for parallel.engram.storage=shared",
        fix="docker run --shm-size=16g (Kubernetes: an emptyDir with medium: Memory at /dev/shm)",
    )


def _open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MIN_FILES:
        return Row(name="open files", ok=True, found=f"{soft} (at most {hard})")
    return Row(
        name="open files",
        ok=False,
        found=str(soft),
        problem=f"fewer than {_MIN_FILES}: a rank may fail to open shards or sockets",
        fix=f"ulimit -n {_MIN_FILES if hard < 0 else min(hard, 65536)}",
    )


def _clock() -> Row:
    """It must not be before this program was written: heartbeats and file times would mean nothing."""
    written = Path(launch.__file__).stat().st_mtime
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if time.time() >= written:
        return Row(name="clock", ok=True, found=found)
    return Row(
        name="clock",
        ok=False,
        found=found,
        problem="before the time at which this installation was written",
        fix="set it; chronyd or systemd-timesyncd keep it right",
    )
