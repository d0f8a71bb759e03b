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
from dataclasses import dataclass
from pathlib import Path

from launch.attempt import Attempt, StopSignals, run_attempt
from launch.crew import LOST_EXIT_CODE, Crew, Leader, join
from launch.local import Run, lead
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


@dataclass(frozen=True, kw_only=True)
class _Place:
    """This node and how it finds the others."""

    run_dir: Path
    recipe: Path
    config: RunConfig
    module: str
    node: Node
    address: tuple[str, int]
    """Of node 0."""

    @property
    def run(self) -> str:
        """What all nodes have in common."""
        return hashlib.sha256(self.recipe.read_bytes()).hexdigest()


def _run(options: argparse.Namespace) -> int:
    recipe: Path = options.recipe or options.run_dir / "recipe.yaml"
    if not recipe.is_file():
        raise RunDirError(f"{recipe}: no recipe; `mneme show RECIPE > {recipe}` makes one")
    config = load_resolved(recipe)
    place = _Place(
        run_dir=options.run_dir,
        recipe=recipe,
        config=config,
        module=options.module,
        node=_node(config, options.node),
        address=_address(options.endpoint),
    )
    with StopSignals() as signals:
        return _lead(place, signals) if place.node.number == 0 else _follow(place, signals)


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


def _lead(place: _Place, signals: StopSignals) -> int:
    """Be node 0."""
    _prepare(place)
    # After a power cut the job may be here before the lock of the old node 0 has expired.
    with (
        held(place.run_dir, patience_seconds=60.0),
        Crew(place.node, address=place.address, run=place.run) as crew,
    ):
        run = Run(
            run_dir=place.run_dir,
            config=place.config,
            module=place.module,
            crew=crew,
            signals=signals,
        )
        verdict = lead(run, interrupted_code=LOST_EXIT_CODE)
    print(f"{place.run_dir}: {verdict.state}, {verdict.reason}", flush=True)
    return verdict.exit_code


def _prepare(place: _Place) -> None:
    """Make the directory ready for ranks; refuses what cannot be trained here."""
    inside = place.run_dir / "recipe.yaml"
    if inside.is_file() and load_resolved(inside) != place.config:
        raise RunDirError(f"{place.run_dir}: holds a run of another recipe; use another directory")
    if problems := obstacles(place.config):
        raise ValueError("\n".join(problems))
    place.run_dir.mkdir(parents=True, exist_ok=True)
    write_environment(place.run_dir)
    if not inside.is_file():
        write_recipe(place.run_dir, place.config, ())


def _follow(place: _Place, signals: StopSignals) -> int:
    """Be another node."""
    leader = join(
        place.address,
        place.node,
        run=place.run,
        seconds=place.config.launch.join_deadline_seconds,
        stopped=lambda: signals.requested is not None,
    )
    if leader is not None:
        return _obey(leader, place, signals)
    if signals.requested:
        return STOPPED_EXIT_CODE
    host, port = place.address
    print(
        f"node 0 does not answer at {host}:{port}: start it there, with the same RUN_DIR, or raise "
        "launch.join_deadline_seconds",
        file=sys.stderr,
    )
    return LOST_EXIT_CODE


def _obey(leader: Leader, place: _Place, signals: StopSignals) -> int:
    """Run attempts as node 0 says."""
    node = place.node
    while (order := leader.next_order(signals)) is not None:
        if "leave" in order:
            return int(order["leave"])
        attempt = Attempt(
            run_dir=place.run_dir,
            config=place.config,
            module=place.module,
            number=int(order["attempt"]),
            node=node,
            endpoint=f"{place.address[0]}:{order['port']}",
        )
        first = node.number * node.ranks
        ranks = f"ranks {first} to {first + node.ranks - 1}" if node.ranks > 1 else f"rank {first}"
        print(f"node {node.number}: attempt {attempt.number}, {ranks}", flush=True)
        attempt.logs.mkdir(parents=True, exist_ok=True)
        leader.report(run_attempt(attempt, signals, leader, lambda text: print(text, flush=True)))
    print(f"node {node.number}: lost node 0, ended its ranks", file=sys.stderr)
    return LOST_EXIT_CODE


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)
