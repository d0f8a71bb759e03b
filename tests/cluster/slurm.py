"""A Slurm of two nodes on this host: its own directory, ports, key and daemons; nothing global.

The daemons run until `close`; the two nodes are two slurmd with the host's own address.
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from launch.host import reserved_port

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

_CONFIGURATION = """\
ClusterName=mneme
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldPort={ports[0]}
StateSaveLocation={dir}/ctld
SlurmdSpoolDir={dir}/d-%n
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
InactiveLimit=0
KillWait=5
MinJobAge=300
JobRequeue=1
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=debug Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def why_missing() -> str | None:
    """What keeps a Slurm from being started here; None: nothing."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in BINARIES if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install -y slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """Daemons of a cluster with nodes n0 and n1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("ctld", "d-n0", "d-n1", "log"):
            (directory / name).mkdir(parents=True)
        with ExitStack() as stack:
            ports = [stack.enter_context(reserved_port("")) for _ in range(3)]
        path = directory / "slurm.conf"
        path.write_text(
            _CONFIGURATION.format(
                dir=directory, host=platform.node().split(".")[0], ports=ports, cpus=os.cpu_count()
            )
        )
        self.environment = os.environ | {
            "SLURM_CONF": str(path),
            "PATH": os.environ["PATH"] + ":/usr/sbin",
        }

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        self._start_munge()
        configuration = self.environment["SLURM_CONF"]
        self._start("slurmctld", "-D", "-f", configuration)
        for node in ("n0", "n1"):
            self._start("slurmd", "-D", "-f", configuration, "-N", node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D") == "idle 2", 60)

    def run(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        return (done.stdout if done.returncode == 0 else done.stderr).strip()

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING; empty once it is forgotten."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait_for(self, what: Callable[[], bool], seconds: float) -> None:
        """Wait; a failure shows the log of the controller."""
        deadline = time.monotonic() + seconds
        while not what():
            log = self.directory / "log/slurmctld.log"
            said = log.read_text()[-3000:] if log.exists() else ""
            assert time.monotonic() < deadline, said
            time.sleep(0.2)

    def close(self) -> None:
        """End the daemons, and what is left of jobs with them."""
        self.run("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start_munge(self) -> None:
        """A munged of our own: it must not find its key and socket in a directory that others write."""
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": self.directory / "munge.socket"}
        files |= {
            f"{name}-file": self.directory / f"munge.{name}" for name in ("pid", "log", "seed")
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", "--foreground", "--force", "--num-threads=2", *options)
        self.wait_for((self.directory / "munge.socket").exists, 20)

    def _start(self, *command: str) -> None:
        with (self.directory / f"log/{command[0]}.out").open("ab") as output:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        self._daemons.append(daemon)


def host_answers() -> bool:
    """Whether this host's name can be resolved, which Slurm needs."""
    try:
        socket.gethostbyname(platform.node())
    except OSError:
        return False
    return True
