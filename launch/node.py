"""One node of a run on several: `python -m launch.node RUN_DIR --node K --endpoint HOST:PORT`.

A cluster manager, or a person, starts this once on every node; `mneme launch` writes the files that
do so. All nodes see the run directory. Node 0 leads (`launch.local`), the others follow it through
`launch.crew`. Stop requests to any of them save one and the same step on all ranks. Exit codes: 0
done, 2 wrong input, 85 stopped after saving, 86 by an alarm, 75 a node was lost or did not save in
time (start again), 1 failed for good. The same on all nodes that are there to hear it.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from launch.attempt import Attempt, StopSignals, run_attempt
from launch.crew import LOST_EXIT_CODE, Crew, Leader, join
from launch.local import lead
from launch.ranks import Node
from launch.run_dir import RunDirError, held, write_environment, write_recipe
from launch.start import obstacles
from launch.validate import world_size
from train.config import RunConfig
from train.recipe import load_resolved
from train.stop import STOPPED_EXIT_CODE, WRONG_INPUT_EXIT_CODE


_NUMBERS = ("SLURM_NODEID", "PET_NODE_RANK", "VC_TASK_INDEX", "JOB_COMPLETION_INDEX")
"""Environment variables by which Slurm, Kubeflow, Volcano and Kubernetes number the nodes."""


def main() -> int:
    """Run this node to the end; returns its exit code."""
    options = _parse()
    try:
        return _run(options)
    except ValueError as error:  # by the house rule, what a user can fix
        print(error, file=sys.stderr)
        return WRONG_INPUT_EXIT_CODE


def _run(options: argparse.Namespace) -> int:
    run_dir: Path = options.run_dir
    recipe: Path = options.recipe or run_dir / "recipe.yaml"
    if not recipe.is_file():
        raise RunDirError(f"{recipe}: no recipe; `mneme show RECIPE > {recipe}` makes one")
    config = load_resolved(recipe)
    node = _node(config, options.node)
    address = _address(options.endpoint)
    run = hashlib.sha256(recipe.read_bytes()).hexdigest()
    with StopSignals() as signals:
        if node.number > 0:
            return _follow(options, config, node, address, run, signals)
        _prepare(run_dir, recipe, config)
        # After a power cut the job may be here before the lock of the old node 0 has expired.
        with held(run_dir, patience_seconds=60.0), Crew(node, address=address, run=run) as crew:
            verdict = lead(
                run_dir,
                config,
                crew,
                signals,
                module=options.module,
                interrupted_code=LOST_EXIT_CODE,
            )
    print(f"{run_dir}: {verdict.state}, {verdict.reason}", flush=True)
    return verdict.exit_code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.node", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="seen by all nodes")
    parser.add_argument(
        "--node", type=int, help=f"number of this node, from 0 (default: {' or '.join(_NUMBERS)})"
    )
    parser.add_argument(
        "--endpoint", required=True, metavar="HOST:PORT", help="node 0, and a free port of it"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="put into RUN_DIR when the run begins"
    )
    parser.add_argument("--module", default="train.run", help=argparse.SUPPRESS)  # for tests
    return parser.parse_args()


def _node(config: RunConfig, number: int | None) -> Node:
    count = config.launch.nodes
    if number is None:
        said = [os.environ[name] for name in _NUMBERS if name in os.environ]
        if not said:
            raise ValueError(f"--node: missing, and none of {', '.join(_NUMBERS)} is set; type it")
        number = int(said[0])
    if not 0 <= number < count:
        raise ValueError(f"--node {number}: launch.nodes={count}, so use 0 to {count - 1}")
    return Node(number=number, count=count, ranks=world_size(config) // count)


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"--endpoint {endpoint}: must be HOST:PORT of node 0; for example node0:29400"
        )
    return host, int(port)


def _prepare(run_dir: Path, recipe: Path, config: RunConfig) -> None:
    """Make the directory ready for ranks; refuses what cannot be trained here."""
    inside = run_dir / "recipe.yaml"
    if inside.is_file() and load_resolved(inside) != config:
        raise RunDirError(f"{run_dir}: holds a run of another recipe; use another directory")
    if problems := obstacles(config):
        raise ValueError("\n".join(problems))
    run_dir.mkdir(parents=True, exist_ok=True)
    write_environment(run_dir)
    if recipe != inside and not inside.is_file():
        write_recipe(run_dir, config, ())


def _follow(
    options: argparse.Namespace,
    config: RunConfig,
    node: Node,
    address: tuple[str, int],
    run: str,
    signals: StopSignals,
) -> int:
    leader = join(
        address,
        node,
        run=run,
        seconds=config.launch.join_deadline_seconds,
        stopped=lambda: signals.requested is not None,
    )
    if leader is None and signals.requested:
        return STOPPED_EXIT_CODE
    if leader is None:
        print(
            f"node 0 does not answer at {options.endpoint}: start it there, with the same "
            "RUN_DIR, or raise launch.join_deadline_seconds",
            file=sys.stderr,
        )
        return LOST_EXIT_CODE
    return _obey(leader, options, config, node, address[0], signals)


def _obey(
    leader: Leader,
    options: argparse.Namespace,
    config: RunConfig,
    node: Node,
    host: str,
    signals: StopSignals,
) -> int:
    """Run attempts as node 0 says."""
    while True:
        order = leader.next_order(signals)
        if order is None:
            print(f"node {node.number}: lost node 0, ended its ranks", file=sys.stderr)
            return LOST_EXIT_CODE
        if "leave" in order:
            return int(order["leave"])
        attempt = Attempt(
            run_dir=options.run_dir,
            config=config,
            module=options.module,
            number=int(order["attempt"]),
            node=node,
            endpoint=f"{host}:{order['port']}",
        )
        first = node.number * node.ranks
        ranks = f"ranks {first} to {first + node.ranks - 1}"
        print(f"node {node.number}: attempt {attempt.number}, {ranks}", flush=True)
        attempt.logs.mkdir(parents=True, exist_ok=True)
        leader.report(run_attempt(attempt, signals, leader, lambda text: print(text, flush=True)))


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)
