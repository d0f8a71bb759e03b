"""torch's launcher, set up for our ranks. `launch.runner` calls this, and nobody else: needs torch."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.events.handlers import get_logging_handler
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.forked import ranks_are_forked
from launch.ranks import Node, RankFiles
from train.lifetime import EXIT_CODE_FILE

_IN_ONE_LOG = ("-c", 'exec "$@" 2>&1', "sh")
"""Arguments of a shell that becomes the command after them; torch opens a file per stream, and
two of them for one log would overwrite each other."""

_EVENTS = "console"
"""The handler of torch's events that we read, and that prints them otherwise."""


class RankLogs(LogsSpecs):
    """`rank-R.log` with stdout and stderr, by global rank, and the other files of a rank."""

    def __init__(self, logs: Path) -> None:
        super().__init__(str(logs))
        self._logs = logs

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files of every local rank, and tell each in its environment."""
        files = {local: RankFiles(self._logs, int(env["RANK"])) for local, env in envs.items()}
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = str(files[local].error)
            env[EXIT_CODE_FILE] = str(files[local].exit_code)
        return LogsDest(
            stdouts={local: str(own.log) for local, own in files.items()},
            stderrs=dict.fromkeys(envs, ""),
            error_files={local: str(own.error) for local, own in files.items()},
        )

    @property
    def root_log_dir(self) -> str:
        """The folder of the attempt."""
        return str(self._logs)


def run_to_end(
    command: Sequence[str],
    *,
    logs: Path,
    node: Node,
    endpoint: str,
    run_id: str,
    started: Callable[[dict[int, int]], None],
    forked: bool,
) -> dict[int, int]:
    """Run the ranks of this node until all are gone.

    Blocks the calling thread, which has to be the main one. If a rank fails, torch ends the others:
    SIGTERM, which ours take for a stop request, and SIGKILL 30 s later.

    Args:
        command: what each rank runs.
        logs: for `RankFiles`.
        node: which ranks; every node of the run has to call this.
        endpoint: HOST:PORT where torch opens the store in which the ranks meet, on node 0.
        run_id: name of this attempt.
        started: called with {rank: process id} when all of this node run.
        forked: whether the ranks are forks of this process, and `command` says only what they do.

    Returns:
        {rank: exit code} of the ranks of this node, negative for a signal.
    """
    pids: dict[int, int] = {}

    def read(record: logging.LogRecord) -> bool:
        event = Event.deserialize(record.getMessage())
        if event.source == EventSource.WORKER and event.metadata["state"] == "START":
            pids[int(str(event.metadata["global_rank"]))] = int(str(event.metadata["worker_id"]))
            if len(pids) == node.ranks:
                started(pids)
        return False  # nothing is printed

    get_logging_handler(_EVENTS).addFilter(read)
    config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=node.ranks,
        run_id=run_id,
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": node.number},
        max_restarts=0,
        logs_specs=RankLogs(logs),
        event_log_handler=_EVENTS,
    )
    # torch replaces ${local_rank} in arguments.
    arguments = [text.replace("$", "$$") for text in (*_IN_ONE_LOG, *command)]
    try:
        with ranks_are_forked() if forked else nullcontext():
            elastic_launch(config, "/bin/sh")(*arguments)
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
    else:
        failures = {}
    return dict.fromkeys(pids, 0) | failures
