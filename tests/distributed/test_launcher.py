"""The launcher with real processes: signals, crashes, exit codes, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.launching import ROOT, Launcher


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def start(
        ranks: int = 2,
        deadline: float = 10.0,
        module: str = "tests.distributed.toy_rank",
        backend: str = "cpu",
        **toy: Any,
    ) -> Launcher:
        launcher = Launcher(
            tmp_path,
            toy,
            ranks=ranks,
            deadline=deadline,
            module=module,
            restarts=0,
            backend=backend,
        )
        started.append(launcher)
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.communicate()


BOTH_WAYS = pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)]
)
"""Ranks are forks of the runner where no driver is, and else programs of their own."""


@pytest.mark.parametrize(
    ("backend", "program"), [("cpu", "launch.runner"), ("cuda", "tests.distributed.toy_rank")]
)
def test_ranks_are_forks_only_where_no_driver_is(
    launch: Callable[..., Launcher], backend: str, program: str
) -> None:
    launcher = launch(steps=10**6, backend=backend)
    launcher.wait_for_both()
    command = psutil.Process(int((launcher.run_dir / "pid-0").read_text())).cmdline()
    launcher.process.send_signal(signal.SIGTERM)
    assert command[command.index("-m") + 1] == program
    assert launcher.finish()[0] == 85


@BOTH_WAYS
def test_ranks_meet_over_gloo_and_leave_logs_and_a_status(
    launch: Callable[..., Launcher], backend: str
) -> None:
    launcher = launch(gloo=True, backend=backend)
    code, output = launcher.finish()
    assert code == 0, output
    assert launcher.status == {
        "state": "done",
        "step": 5,
        "tokens": 40,
        "last_checkpoint": "checkpoints/step-00000005",
        "reason": "all steps done",
        "ranks": 2,
    }
    for rank in range(2):
        log = (launcher.run_dir / f"logs/attempt-1/rank-{rank}.log").read_text()
        assert log == f"rank {rank} on stderr\nrank {rank} of 2, threads 3, safe path True\n"
    assert "step 5/5" in output


@pytest.mark.parametrize(
    "name",
    ["SIGUSR1"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGINT", "SIGHUP")],
)
def test_a_signal_saves_and_the_next_attempt_goes_on(
    launch: Callable[..., Launcher], name: str
) -> None:
    launcher = launch(steps=10**6)
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.Signals[name])
    code, output = launcher.finish()  # the ranks leave 0.3 s apart
    assert code == 85, output
    assert launcher.status["state"] == "stopped"
    assert name in launcher.status["reason"]
    assert launcher.exit_codes == {"0": 85, "1": 85}
    assert launcher.alive() == []
    step = launcher.status["step"]
    assert launcher.status["last_checkpoint"] == f"checkpoints/step-{step:08d}"
    again = launch(steps=step + 2)
    assert again.finish()[0] == 0
    rows = (again.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == list(range(1, step + 3))
    assert (again.run_dir / "logs/attempt-2/rank-1.log").exists()


def test_an_alarm_that_stops_is_not_a_request_to_be_started_again(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, alarm_at=3)
    code, output = launcher.finish()
    assert code == 86, output
    assert launcher.status["state"] == "stopped"
    assert "alarm" in launcher.status["reason"]
    assert launcher.exit_codes == {"0": 86, "1": 86}
    assert launcher.status["last_checkpoint"] == "checkpoints/step-00000003"


def test_a_signal_before_the_ranks_listen_is_kept_for_them(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, slow_start=1.0)
    launcher.wait_for((launcher.run_dir / "pid-1").exists)
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 85, output
    assert launcher.status["step"] >= 1


def test_a_second_ctrl_c_kills_at_once(launch: Callable[..., Launcher]) -> None:
    launcher = launch(steps=10**6, hang_on_stop=[0, 1])
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert launcher.process.poll() is None
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.finish()
    assert time.monotonic() - started < 2.0
    assert code == 1
    assert "second Ctrl-C" in output
    assert launcher.alive() == []


def test_a_rank_that_does_not_save_in_time_is_killed_and_named(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, hang_on_stop=[1], deadline=0.8)
    launcher.wait_for_steps()
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 1
    assert "rank 1 had not saved and left 0.8 s after the stop request" in output
    assert "launch.stop_deadline_seconds" in output
    assert launcher.status["state"] == "failed"
    assert launcher.alive() == []


@BOTH_WAYS
def test_the_rank_that_failed_first_is_named_not_its_victims(
    launch: Callable[..., Launcher], backend: str
) -> None:
    launcher = launch(gloo=True, record=True, crash=[1], steps=10**6, backend=backend)
    code, output = launcher.finish()
    assert code == 1
    assert "rank 1 failed: ValueError: the toy broke" in output
    assert "toy_rank.py" in output
    assert str(launcher.run_dir / "logs/attempt-1/rank-1.log") in output
    assert launcher.status["state"] == "failed"
    assert "the toy broke" in launcher.status["reason"]
    assert launcher.alive() == []


@pytest.mark.parametrize(
    ("toy", "said", "rank", "exit_code"),
    [
        ({"segfault": [1]}, "rank 1 was killed by SIGSEGV", "1", -signal.SIGSEGV),
        ({"bad_exit": [0]}, "rank 0 failed: exit code 3\n  rank 0 on stderr", "0", 3),
    ],
)
@BOTH_WAYS
def test_a_failure_without_a_record_is_explained_and_ends_the_others(
    launch: Callable[..., Launcher],
    backend: str,
    toy: dict[str, Any],
    said: str,
    rank: str,
    exit_code: int,
) -> None:
    launcher = launch(steps=10**6, child=[0, 1], backend=backend, **toy)
    code, output = launcher.finish()
    assert code == 1
    assert said in output
    assert launcher.exit_codes[rank] == exit_code
    assert launcher.alive() == []
    assert len(list(launcher.run_dir.glob("child-*"))) == 2
    assert launcher.alive("child-*") == []


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_hold_up_the_failure_of_another(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(steps=10**6, hang_on_stop=[0], crash=[1])
    started = time.monotonic()
    code, output = launcher.finish()
    assert time.monotonic() - started < 25.0  # torch's launcher alone gives it 30
    assert code == 1
    assert "rank 1 failed: exit code 1\n" in output
    assert "ValueError: the toy broke" in output
    assert launcher.exit_codes == {"0": -signal.SIGKILL, "1": 1}
    assert launcher.alive() == []


@pytest.mark.slow
def test_children_that_a_finished_rank_left_are_killed(launch: Callable[..., Launcher]) -> None:
    launcher = launch(child=[0])
    assert launcher.finish()[0] == 0
    assert (launcher.run_dir / "child-0").exists()
    assert launcher.alive("child-*") == []


@pytest.mark.slow
def test_ranks_die_with_a_launcher_that_is_killed(launch: Callable[..., Launcher]) -> None:
    launcher = launch(steps=10**6)
    launcher.wait_for_steps()
    launcher.wait_for((launcher.run_dir / "pid-1").exists)
    assert len(launcher.alive()) == 2
    launcher.process.kill()
    launcher.process.wait()
    deadline = time.monotonic() + 2.0
    while launcher.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert launcher.alive() == []
    assert launcher.status["state"] == "running"  # nobody was left to say otherwise
    assert launch(steps=10**6 + 1, crash=[0]).finish()[0] == 1  # and the directory is free again


def test_a_run_has_one_launcher_at_a_time(launch: Callable[..., Launcher]) -> None:
    first = launch(steps=10**6)
    first.wait_for_steps()
    code, output = launch().finish()
    assert code == 1
    assert "is being trained by another mneme process" in output
    assert first.process.poll() is None
    assert len(first.alive()) == 2


@pytest.mark.parametrize("moment", ["training", pytest.param("starting", marks=pytest.mark.slow)])
def test_a_killed_runner_leaves_nobody_and_is_named(
    launch: Callable[..., Launcher], moment: str
) -> None:
    launcher = launch(steps=10**6, child=[0, 1], daemon=True)
    if moment == "training":
        launcher.wait_for_steps()
        launcher.wait_for_both("child-*")
        assert len(launcher.alive()) == len(launcher.alive("child-*")) == 2
    else:
        launcher.wait_for((launcher.run_dir / "logs/attempt-1/runner-0.log").exists)
    launcher.runner.kill()
    code, output = launcher.finish()
    assert code == 1
    assert "the runner of the ranks was killed by SIGKILL" in output
    assert str(launcher.run_dir / "logs/attempt-1/runner-0.log") in output
    assert launcher.status["state"] == "failed"
    assert launcher.alive() == launcher.alive("child-*") == []
    assert len(list(launcher.run_dir.glob("pid-*"))) == (2 if moment == "training" else 0)


@pytest.mark.slow
def test_a_runner_that_cannot_start_the_ranks_is_named(
    launch: Callable[..., Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")  # torch's launcher wants a number
    launcher = launch()
    code, output = launcher.finish()
    assert code == 1
    assert "the runner of the ranks failed: exit code 1\n" in output
    assert "ValueError: invalid literal" in output
    assert str(launcher.run_dir / "logs/attempt-1/runner-0.log") in output
    assert not list(launcher.run_dir.glob("pid-*"))


@pytest.mark.slow
def test_a_signal_before_the_runner_has_started_the_ranks_is_kept_for_them(
    launch: Callable[..., Launcher],
) -> None:
    launcher = launch(deadline=60.0, steps=10**6)
    launcher.wait_for((launcher.run_dir / "logs/attempt-1/runner-0.log").exists)
    # The runner imports torch for a second or more before it starts them.
    launcher.process.send_signal(signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 85, output
    assert launcher.status["step"] >= 1


@pytest.mark.slow
def test_signals_to_all_processes_at_once_save_as_well(launch: Callable[..., Launcher]) -> None:
    """A cluster may signal every process of a job: the runner ignores it, the ranks do not."""
    launcher = launch(steps=10**6, slow_start=0.5)
    launcher.wait_for_both()
    for pid in (launcher.process.pid, launcher.runner.pid, *launcher.alive()):
        os.kill(pid, signal.SIGTERM)
    code, output = launcher.finish()
    assert code == 85, output
    assert launcher.exit_codes == {"0": 85, "1": 85}


@pytest.mark.slow
def test_a_stop_request_to_one_rank_stops_all(launch: Callable[..., Launcher]) -> None:
    launcher = launch(steps=10**6)
    launcher.wait_for_steps()
    launcher.wait_for_both()
    os.kill(int((launcher.run_dir / "pid-1").read_text()), signal.SIGUSR1)
    code, output = launcher.finish()
    assert code == 85, output
    assert "stopped on request to a rank" in launcher.status["reason"]
    assert launcher.exit_codes == {"0": 85, "1": 85}


@pytest.mark.slow
def test_what_a_rank_says_before_it_runs_is_in_its_log(launch: Callable[..., Launcher]) -> None:
    launcher = launch(ranks=1, module="tests.distributed.no_such_module")
    code, output = launcher.finish()
    assert code == 1
    assert "rank 0 failed: exit code 1\n" in output
    assert "No module named tests.distributed.no_such_module" in output


STUDY = """
import sys
from pathlib import Path
from launch.study import run_study

study, runs, trainer = sys.argv[1:]
command = [sys.executable, "-c", Path(trainer).read_text()]
run_study(study, seeds=1, runs_dir=Path(runs), overrides=[], command=command)
"""
TRAINER = """
import sys
from pathlib import Path
from launch.local import run_ranks
from train.config import RunConfig

run_dir = Path(sys.argv[-1])
run_dir.mkdir(parents=True)
run_ranks(run_dir, RunConfig(name="toy"), module="tests.distributed.toy_rank")
"""


@pytest.mark.slow
def test_a_killed_study_leaves_nobody(tmp_path: Path) -> None:
    study = tmp_path / "toy.yaml"
    arms = "{with: [], without: [model.engram=null]}"
    claim = "[{name: loss, statement: s, arm: without, against: with}]"
    texts = "name: toy, description: d, question: q, expectation: e, scale_note: s"
    study.write_text(
        f"{{{texts}, recipe: v4_nano, budget_tokens: 40960, arms: {arms}, hypotheses: {claim}}}"
    )
    (tmp_path / "trainer").write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(study), str(tmp_path), str(tmp_path / "trainer")],
        env=os.environ | {"TOY": json.dumps({"steps": 10**6}), "PYTHONPATH": str(ROOT)},
    )
    started = tmp_path / "study-toy/with-seed0/pid-0"
    deadline = time.monotonic() + 45
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3  # launcher, runner, rank
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
