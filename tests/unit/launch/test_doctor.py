"""`mneme doctor`: every row says what is wrong and what to do; whatever ranks do, it goes on."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launch.cli import main
from launch.doctor import backends, command, conformance, environment, installed
from launch.doctor.row import Row

ROOT = Path(__file__).parents[3]


def row(rows: list[Row], name: str) -> Row:
    [found] = [one for one in rows if one.name.startswith(name)]
    return found


def test_this_machine_is_fit_for_the_tests() -> None:
    names = [one.name.split(" of ")[0] for one in environment.rows()]
    assert names[:4] == ["python", "cores", "memory", "disk"]
    assert {"open files", "clock"} <= set(names)
    assert row(list(installed.rows()), "packages").ok


def usage(free: int, total: int) -> Callable[[Path], Any]:
    return lambda path: SimpleNamespace(free=free, total=total)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (
            lambda patch: patch.setattr(
                psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30)
            ),
            "memory",
            "less than the 4 GiB",
        ),
        (
            lambda patch: patch.setattr(shutil, "disk_usage", usage(1 << 30, 1 << 40)),
            "disk of ",
            "less than the 5 GiB",
        ),
        (
            lambda patch: patch.setattr(shutil, "disk_usage", usage(1 << 40, 64 << 20)),
            "shared memory",
            "too little for NCCL",
        ),
        (
            lambda patch: patch.setattr(resource, "getrlimit", lambda kind: (256, 4096)),
            "open files",
            "fewer than 1024",
        ),
        (lambda patch: patch.setattr(time, "time", lambda: 1e9), "clock", "before the time"),
    ],
    ids=["memory", "disk", "shared memory", "open files", "clock"],
)
def test_what_a_machine_lacks_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], name: str, said: str
) -> None:
    with monkeypatch.context() as patch:
        change(patch)
        rows = list(environment.rows())
    found = row(rows, name)
    assert found.ok is False
    assert said in (found.problem or "")
    assert found.fix


def test_a_missing_or_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["torch>=99", "no-such-package>=1", "numpy>=1", "pytest>=9; extra == 'test'"]
    monkeypatch.setattr(installed, "requires", lambda name: wrong)
    found = row(list(installed.rows()), "packages")
    assert found.ok is False
    problem = (found.problem or "").splitlines()
    assert problem[0].startswith("torch 2.")
    assert problem[0].endswith("is not >=99")
    assert problem[1:] == ["no-such-package is missing"]


def test_other_versions_than_the_tested_ones_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\nNumPy==1.0  # old\n")
    monkeypatch.setattr(installed, "_CONSTRAINTS", tmp_path / "constraints.txt")
    found = row(list(installed.rows()), "tested versions")
    assert found.ok is None
    assert "numpy 2." in found.found
    assert "(tested: 1.0)" in found.found
    assert "torch" not in found.found


def test_a_torch_that_cannot_be_imported_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback\n  File x\nImportError: libtorch.so: no such file\n"
    monkeypatch.setattr(backends, "_run", lambda *args: (1, "", said))
    probe = backends.probe_torch("auto")
    assert probe.chosen is None
    found = row(probe.rows, "torch")
    assert found.ok is False
    assert "libtorch.so" in (found.problem or "")


def test_ranks_that_deviate_hang_or_die_cost_only_their_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conformance.Team, "MODULE", "tests.unit.launch.fake_conformance_rank")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = set(psutil.Process().children())
    rows = list(conformance.rows("fake", 2, deadline_seconds=1.5))
    assert set(psutil.Process().children()) <= before
    ok = {one.name.removeprefix("fake: "): one.ok for one in rows}
    assert ok == {
        "well": True,
        "deviates": False,
        "well again": True,
        "hangs": False,
        "dies": False,
        "well at last": True,
        "loses a rank": True,
        "aborts": True,
    }
    deviates = row(rows, "fake: deviates")
    assert deviates.problem == "rank 0: sum of int64: got 3, not 4 (port 1)\nneeded for everything"
    assert deviates.fix == "mend it\nLOG=1 says more"
    assert (row(rows, "fake: hangs").problem or "").startswith("rank 1 hangs, and was killed")
    dies = row(rows, "fake: dies").problem or ""
    assert dies.startswith("rank 1 ended with exit code 3\nlibfake: no such file")


def test_ranks_that_do_not_start_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance.Team, "MODULE", "tests.no_such_module")
    [found] = list(conformance.rows("fake", 2))
    assert found.ok is False
    assert "rank 0 left before the first check" in (found.problem or "")
    assert "No module named" in (found.problem or "")


@pytest.mark.parametrize(
    ("rows", "code", "last"),
    [
        ([Row(name="a", ok=True), Row(name="b", ok=None)], 0, "all is well: 1 checks"),
        ([Row(name="a", ok=True), Row(name="b", ok=False, problem="p", fix="f")], 1, "failed: b"),
    ],
)
def test_the_exit_code_follows_the_red_rows(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list[Row],
    code: int,
    last: str,
) -> None:
    monkeypatch.setattr(command, "_rows", lambda backend, nproc: iter(rows))
    assert main(["doctor"]) == code
    assert last in capsys.readouterr().out.splitlines()[-1]
    assert main(["doctor", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    assert [check["name"] for check in answer["checks"]] == ["a", "b"]
    assert {"name", "ok", "problem", "fix"} <= set(answer["checks"][0])


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nproc", "0"]) == 2
    assert "--nproc 0: must be positive; use --nproc 2" in capsys.readouterr().err


def doctor(*arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    found = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
    )
    assert found.returncode in (0, 1), found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    return found.returncode, answer


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("backend", ["cpu", "simulated"])
def test_the_host_is_well(backend: str) -> None:
    code, answer = doctor("--backend", backend)
    red = [check for check in answer["checks"] if check["ok"] is False]
    assert (code, answer["ok"], red) == (0, True, [])
    checked = [one["name"] for one in answer["checks"] if one["name"].startswith(f"{backend}: ")]
    assert len(checked) > 25
    assert f"{backend}: dead rank" in checked


@pytest.mark.slow
def test_an_absent_device_is_a_red_row_with_the_reason() -> None:
    code, answer = doctor("--backend", "cuda")
    [red] = [check for check in answer["checks"] if check["ok"] is False]
    assert (code, red["name"]) == (1, "backend cuda")
    assert "backend cuda cannot be used here" in red["problem"]
    assert "--backend cpu" in red["fix"]
