import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")

CHILD = "from train.lifetime import die_with_parent; die_with_parent(); print('lives', flush=True)"


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = f"{CHILD}; import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert psutil.pid_exists(pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("launcher", "lives"), [(os.getpid(), True), (1 << 22, False)])
def test_a_child_whose_launcher_is_already_gone_ends_at_once(launcher: int, lives: bool) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"MNEME_LAUNCHER_PID": str(launcher)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == (0 if lives else -signal.SIGKILL), result.stderr
    assert (result.stdout == "lives\n") is lives
