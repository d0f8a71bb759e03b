import os
import socket
import subprocess
import time
from pathlib import Path

import psutil

from launch.host import no_survivors, reserved_port
from launch.ranks import Rank, RankFiles, first_failure


def ended(tmp_path: Path, number: int, code: int, recorded_at: float | None = None) -> Rank:
    """A rank that has left; a signal (negative code) gave it no time to say so."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    files = RankFiles(tmp_path, number)
    if code >= 0:
        files.exit_code.write_text(str(code))
    if recorded_at is not None:
        files.error.write_text("{}")
        os.utime(files.error, (recorded_at, recorded_at))
    rank = Rank(process.pid, files)
    rank.exit_code = code
    return rank


def first(ranks: list[Rank]) -> Rank:
    found = first_failure(ranks)
    assert found is not None
    return found


def test_the_earliest_recorded_exception_is_the_first_failure(tmp_path: Path) -> None:
    ranks = [
        ended(tmp_path, 0, 85),
        ended(tmp_path, 1, 1),
        ended(tmp_path, 2, 1, recorded_at=2000.5),
        ended(tmp_path, 3, 1, recorded_at=2000.25),
    ]
    assert first(ranks).number == 3
    assert first_failure(ranks[:1]) is None


def test_a_rank_killed_from_outside_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    ranks = [ended(tmp_path, 0, 1, recorded_at=1.0), ended(tmp_path, 1, -9)]
    assert first(ranks).number == 1
    assert "SIGKILL (out of memory?" in first(ranks).explain()
    aborted = ended(tmp_path, 2, -6, recorded_at=2.0)  # it lost rank 1, and died while it left
    assert first([*ranks, aborted]).number == 1
    assert first([ranks[0], aborted]).number == 0
    assert "see " in aborted.explain()


def test_ranks_that_were_ended_because_another_failed_are_not_named(tmp_path: Path) -> None:
    ours, theirs = ended(tmp_path, 0, -9), ended(tmp_path, 1, -15)
    ours.killed = True
    culprit = ended(tmp_path, 2, 1)
    assert first([ours, theirs, culprit]).number == 2
    slow = ended(tmp_path, 3, -15, recorded_at=1.0)  # it failed first and was about to exit
    assert first([ours, theirs, culprit, slow]).number == 3


def test_an_exit_that_nobody_announced_is_a_failure(tmp_path: Path) -> None:
    rank = ended(tmp_path, 0, 0)
    assert not rank.failed()
    RankFiles(tmp_path, 0).exit_code.unlink()
    assert rank.failed()
    RankFiles(tmp_path, 0).exit_code.touch()  # killed while it wrote
    assert rank.failed()


def test_a_running_rank_has_neither_failed_nor_stopped(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        rank = Rank(process.pid, RankFiles(tmp_path, 0))
        assert rank.is_running()
        assert not rank.failed()
        assert not rank.stopped()
        rank.kill()
        while rank.is_running():  # a zombie has left
            time.sleep(0.01)
    assert rank.killed
    assert rank.failed()


def test_an_unreadable_record_still_names_the_file(tmp_path: Path) -> None:
    rank = ended(tmp_path, 0, 1, recorded_at=1.0)
    assert rank.explain() == f"rank 0 failed: see {RankFiles(tmp_path, 0).error}"


def test_no_descendant_survives_but_others_do(tmp_path: Path) -> None:
    forget = "setsid sh -c 'echo $$ >{0}/pid; exec sleep 60' & while ! test -s {0}/pid; do :; done"
    with subprocess.Popen(["sleep", "60"]) as other:
        with no_survivors():
            subprocess.run(["/bin/sh", "-c", forget.format(tmp_path)], check=True)
            orphan = psutil.Process(int((tmp_path / "pid").read_text()))
            assert orphan.ppid() == os.getpid()
        assert not orphan.is_running()
        assert other.poll() is None
        other.kill()


def test_a_reserved_port_is_handed_to_nobody_but_can_be_asked_for() -> None:
    with reserved_port() as port:
        for _ in range(200):
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", 0))
                assert other.getsockname()[1] != port
        with socket.socket() as store, socket.socket() as peer:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("0.0.0.0", port))
            store.listen()
            peer.connect(("127.0.0.1", port))
