import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from train.lifetime import EXIT_CODE_FILE, fast_imports
from train.stop import held_until_installed

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


@pytest.mark.parametrize(
    ("launcher", "lives"), [(os.getpid(), True), (1 << 22, False)], ids=["lives", "gone"]
)
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


LEAVE = """
import sys, threading, time
from train.lifetime import leave
threading.Thread(target=time.sleep, args=(60,)).start()
sys.stdout.write("said")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3, 85])
@pytest.mark.parametrize("runner", [False, True])
def test_a_rank_leaves_its_code_and_torch_sees_a_stop_as_success(
    tmp_path: Path, code: int, runner: bool
) -> None:
    path = tmp_path / "code"
    result = subprocess.run(
        [sys.executable, "-c", LEAVE, str(code)],
        env=os.environ | ({EXIT_CODE_FILE: str(path)} if runner else {}),
        stdout=subprocess.PIPE,
        timeout=20,
        check=False,
    )
    assert result.stdout == b"said"
    assert result.returncode == (0 if runner and code == 85 else code)
    assert path.exists() is runner
    if runner:
        assert path.read_text() == str(code)


def test_a_stop_request_waits_until_the_process_listens() -> None:
    child = (
        "import sys\n"
        "from train.stop import StopRequest\n"
        "sys.stdin.readline()\n"
        "stop = StopRequest()\n"
        "stop.install()\n"
        "print(stop.signal_name)\n"
    )
    with held_until_installed():
        # One program after another, as the runner starts ranks.
        command = ["/bin/sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", child]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process.send_signal(signal.SIGUSR1)
    assert process.communicate("go\n", timeout=20)[0] == "SIGUSR1\n"
    assert process.returncode == 0


def test_what_is_imported_fast_is_never_collected_and_the_rest_is() -> None:
    frozen = gc.get_freeze_count()
    with fast_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()
