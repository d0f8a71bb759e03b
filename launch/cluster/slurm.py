"""A batch script for Slurm that a person can read.

The script runs on the first node, starts `launch.node` on every node in one step, and hands a stop
request on. Whether the job is queued again afterwards is decided by `launch.cluster.requeue`.
"""

import shlex
import sys
from collections.abc import Iterator

from launch.cluster.spec import LaunchSpec, summary

_BODY = """\
# The node of this script is node 0; the others find it here.
head=$(scontrol show node -o "$SLURMD_NODENAME" | sed 's/.*NodeAddr=\\([^ ]*\\).*/\\1/')
port=$((20000 + SLURM_JOB_ID % 10000))

# USR1 comes before the time limit, to this script alone; all ranks then save and exit with 85.
asked=0
trap 'asked=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# launch.node starts the ranks of its node, and starts all again after a crash. A node that is left
# behind is ended after a minute.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task={cpus} \\
    "$python" -m launch.node "$run" --endpoint="$head:$port" &
step=$!
while true; do  # a signal interrupts `wait`
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

# Saved before the time limit, or a node was lost: queue the job again, unless it gets nowhere.
if "$python" -m launch.cluster.requeue "$run" --code="$code" --asked="$asked"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(spec: LaunchSpec) -> str:
    """The text that `sbatch` takes."""
    head = [
        "#!/bin/bash",
        f"# {summary(spec)}",
        "# Submitted again, it goes on from the newest checkpoint of the run.",
        *(f"#SBATCH {option}" for option in _options(spec)),
        "set -u",
        "",
        f"run={shlex.quote(spec.run_dir)}",
        f"python={shlex.quote(sys.executable)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in spec.cluster.env.items()),
        "export PYTHONSAFEPATH=1",
        *spec.cluster.setup,
        "",
    ]
    return "\n".join(head) + "\n" + _BODY.replace("{cpus}", str(spec.cluster.cpus_per_node))


def _options(spec: LaunchSpec) -> Iterator[str]:
    cluster = spec.cluster
    yield f"--job-name={spec.name}"
    yield f"--nodes={spec.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={cluster.cpus_per_node}"
    if cluster.memory_gib_per_node:
        yield f"--mem={cluster.memory_gib_per_node}G"
    if spec.device:
        yield f"--gres={spec.device.gres}:{spec.ranks_per_node}"
    if cluster.queue:
        yield f"--partition={cluster.queue}"
    if cluster.account:
        yield f"--account={cluster.account}"
    yield f"--time={cluster.time_limit_minutes}"
    yield f"--signal=B:USR1@{spec.stop_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--chdir={_quoted(spec.directory)}"
    yield f"--output={_quoted(spec.run_dir.replace('%', '%%') + '/logs/slurm-%j.log')}"


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path
