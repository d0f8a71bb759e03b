"""Worker processes: order, errors, how they die and how they end."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data.faults import DamagedSampleError
from data.workers import in_processes
from tests.unit.data import jobs


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pids: Sequence[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_items_come_in_the_order_of_the_jobs_and_the_training_draws_the_same_numbers() -> None:
    before = torch.get_rng_state()
    rows = in_processes([partial(jobs.numbers, start) for start in (0, 100, 200)], 2)
    for number, row in enumerate(islice(rows, 5)):
        assert [int(item[-1]) for item in row] == [number, 100 + number, 200 + number]
        assert all((item == item[0]).all() for item in row)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_have_one_thread_and_leave_requests_to_stop_to_the_rank() -> None:
    rows = in_processes([jobs.state_of_the_process], 1)
    [[(pid, threads, blocked, modules)]] = islice(rows, 1)
    assert threads == 1
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= blocked
    assert "data.loader" in modules
    assert "train" not in {name.partition(".")[0] for name in modules}
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for stop in (signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, stop)
    subprocess.run(["kill", "-TERM", str(pid)], check=True)  # by others than the rank
    assert [row[0][0] for row in islice(rows, 3)] == [pid] * 3
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: gone([pid]))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("wrong", ValueError, "data.path=x: is wrong; use y"),
        (
            "damaged",
            DamagedSampleError,
            "source docs, shard shard-000001.tar, key docs/0007: checksum, flipped; restore it",
        ),
        ("awkward", RuntimeError, "AwkwardError: word 3"),
    ],
)
def test_errors_keep_their_type_and_message(
    kind: str, error: type[Exception], message: str
) -> None:
    made: list[Any] = [partial(jobs.numbers, 0), partial(jobs.fails, kind)]
    rows = in_processes(made, 3)
    assert next(rows)[1] == 1
    with pytest.raises(error) as caught:
        next(rows)
    assert type(caught.value) is error
    assert str(caught.value) == message
    [note] = caught.value.__notes__
    assert "In data worker 1 (pid " in note
    assert "jobs.py" in note
    if isinstance(caught.value, DamagedSampleError):
        assert caught.value.fault == jobs.FAULT


def test_workers_end_with_the_iterator() -> None:
    rows = in_processes([jobs.pids, jobs.pids], 1)
    pids = next(rows)
    assert len({*pids, os.getpid()}) == 3
    del rows
    gc.collect()
    wait_for(lambda: gone(pids))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named() -> None:
    rows = in_processes([jobs.pids, jobs.pids], 1)
    pids = next(rows)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=rf"data\.num_workers=2: DataLoader worker \(pid.*{pids[1]}.*fewer"
    ):
        list(islice(rows, 50))


PROGRAM = """
    import sys
    from functools import partial
    from pathlib import Path
    from data.workers import in_processes
    from tests.unit.data import jobs

    if __name__ == "__main__":
        marks = Path(sys.argv[1])
        rows = in_processes([partial(jobs.slow, marks), partial(jobs.slow, marks)], 2)
        print(*next(rows), flush=True)
        {ending}
"""


def start(tmp_path: Path, ending: str) -> "tuple[subprocess.Popen[str], list[int]]":
    """A process whose two workers are busy for minutes, and their ids."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM).format(ending=ending))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, list(map(int, process.stdout.readline().split()))


@pytest.mark.slow
def test_no_worker_outlives_a_rank_that_is_killed(tmp_path: Path) -> None:
    process, pids = start(tmp_path, "import time; time.sleep(600)")
    assert len(pids) == 2
    helpers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert set(pids) <= set(helpers)
    process.kill()
    process.communicate()
    wait_for(lambda: gone(helpers), 10)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "del rows", "import os; os._exit(0)"])
def test_a_process_ends_cleanly_while_its_workers_are_busy(tmp_path: Path, ending: str) -> None:
    process, pids = start(tmp_path, ending)
    _, errors = process.communicate(timeout=40)
    assert (process.returncode, errors) == (0, "")
    wait_for(lambda: gone(pids), 10)
