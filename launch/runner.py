"""The runner: starts the ranks of this node through torch's launcher and tells how they ended.

`launch.local` starts it as `python -m launch.runner RUN_DIR ...`. It decides nothing: stop requests
go from the launcher straight to the ranks, and are blocked here.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from launch.ranks import Node, RankFiles, RunnerFiles
from train.lifetime import LAUNCHER_PID, die_with_parent, fast_imports
from train.stop import SAVED_EXIT_CODES


def main() -> int:
    """Run the ranks to their end; returns the exit code of this node: 0, 85, 86 or 1."""
    die_with_parent()
    options = _parse()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    with fast_imports():
        from launch.elastic import run_to_end  # noqa: PLC0415 - not before die_with_parent

        forked = _can_fork(options.backend)
        if forked and options.module.startswith("train."):
            import train.loop  # noqa: F401, PLC0415 - all of a rank, once

    node = Node(number=options.node, count=options.nodes, ranks=options.ranks)
    files = RunnerFiles(options.logs, node.number)
    seen = run_to_end(
        [sys.executable, "-m", options.module, str(options.run_dir)],
        logs=options.logs,
        node=node,
        endpoint=options.endpoint,
        run_id=f"{options.run_dir.name}-{options.logs.name}",
        forked=forked,
        started=lambda pids: _write(files.pids, pids),
    )
    codes = {rank: code or _stopped(options.logs, rank) for rank, code in seen.items()}
    _write(files.exit_codes, codes)
    return max(codes.values()) if set(codes.values()) <= {0, *SAVED_EXIT_CODES} else 1


def _can_fork(backend: str) -> bool:
    """Whether ranks can be forks of this process.

    Drivers of accelerators do not survive a fork, nor do some libraries of other systems than Linux.
    """
    from parallel.backend.select import computes_on_host  # noqa: PLC0415 - imports torch

    return sys.platform == "linux" and computes_on_host(backend)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.runner", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--logs", type=Path, required=True, help="folder of this attempt")
    parser.add_argument("--module", required=True, help="what a rank runs with RUN_DIR")
    parser.add_argument("--backend", required=True, help="`parallel.backend` of the recipe")
    parser.add_argument("--ranks", type=int, required=True, help="how many, on this node")
    parser.add_argument("--node", type=int, required=True, help="number of this node, from 0")
    parser.add_argument("--nodes", type=int, required=True, help="how many")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT where they meet, on node 0")
    return parser.parse_args()


def _stopped(logs: Path, rank: int) -> int:
    """85 or 86 for a rank that left with 0 but said that it stopped (`train.lifetime.leave`), else 0."""
    return RankFiles(logs, rank).told_exit_code() or 0


def _write(path: Path, numbers: dict[int, int]) -> None:
    """Write {rank: number}; a reader sees all of it or no file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(numbers) + "\n", encoding="ascii")
    temporary.replace(path)


if __name__ == "__main__":
    exit_code = main()
    os._exit(exit_code)
