import os
import socket
from pathlib import Path

from launch.ranks import Rank, first_failure, reserved_port


def ended(tmp_path: Path, number: int, code: int, recorded_at: float | None = None) -> Rank:
    command = ["/bin/sh", "-c", f"exit {code}" if code >= 0 else f"kill {code} $$"]
    rank = Rank(number, command, {}, tmp_path / f"rank-{number}.log")
    while rank.poll() is None:
        pass
    assert rank.exit_code == code
    if recorded_at is not None:
        rank.error_file.write_text("{}")
        os.utime(rank.error_file, (recorded_at, recorded_at))
    return rank


def test_the_earliest_recorded_exception_is_the_first_failure(tmp_path: Path) -> None:
    ranks = [
        ended(tmp_path, 0, 85),
        ended(tmp_path, 1, 1),
        ended(tmp_path, 2, 1, recorded_at=2000.5),
        ended(tmp_path, 3, 1, recorded_at=2000.25),
    ]
    assert first_failure(ranks, (0, 85)).number == 3


def test_a_rank_killed_from_outside_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    ranks = [ended(tmp_path, 0, 1, recorded_at=1.0), ended(tmp_path, 1, -9)]
    first = first_failure(ranks, (0, 85))
    assert first.number == 1
    assert "SIGKILL (out of memory?" in first.explain()


def test_an_unreadable_record_still_names_the_file(tmp_path: Path) -> None:
    rank = ended(tmp_path, 0, 1, recorded_at=1.0)
    assert rank.explain() == f"rank 0 failed: see {rank.error_file}"


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
