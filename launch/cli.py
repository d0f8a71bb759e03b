"""The command `mneme`: what a person types.

Each command is a function here that imports what it needs when it runs: `list`, `show` and
`status` answer in a fraction of a second, without torch. Exit codes: 0 done, 2 the input is wrong
(a message, no traceback), 85 stopped on request after saving, 86 by an alarm, other: failed.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from launch.checkpoint_command import add_checkpoint_actions
from launch.cluster.options import add_options as add_launch_options
from launch.data_command import add_data_actions
from launch.doctor.command import add_doctor_options
from train.lifetime import import_torch_alone

WRONG_INPUT = 2

_Run = Callable[[argparse.Namespace], int]
_Add = Callable[[_Run, str], argparse.ArgumentParser]

_COMMANDS = (
    *("list", "show", "train", "resume", "launch", "status", "logs", "data"),
    *("parity", "bench", "dash", "ablate", "report", "checkpoint", "doctor"),
)
_NOT_YET = {
    "plan": "check a layout and predict memory, speed and cost",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    import_torch_alone()
    try:
        _refuse_unknown(arguments)
        options = _parse(arguments)
        run: _Run = options.run
        code = run(options)
        sys.stdout.flush()
        return code
    except ValueError as error:  # by the house rule, what a user can fix
        print(error, file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mneme list | head`; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _refuse_unknown(arguments: Sequence[str]) -> None:
    """Name the nearest command for a mistyped one, and what is planned but not there."""
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        return
    for typed in (words[0], " ".join(words[:2])):
        if typed in _NOT_YET:
            raise ValueError(f"mneme {typed}: not available yet; there is {', '.join(_COMMANDS)}")
    if words[0] not in _COMMANDS:
        nearest = get_close_matches(words[0], _COMMANDS, n=3) or _COMMANDS
        raise ValueError(f"mneme {words[0]}: no such command; use {', '.join(nearest)}")


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, with overrides before, between and after options."""
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _build_parser() -> argparse.ArgumentParser:
    not_yet = "\n".join(f"  {name:<21} {purpose}" for name, purpose in _NOT_YET.items())
    parser = _Parser(
        prog="mneme",
        description="Distributed pretraining of memory-augmented mixture-of-experts models.",
        epilog=f"not available yet:\n{not_yet}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def add(run: _Run, purpose: str) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_").removesuffix("_command")
        command = group.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    _add_recipes_and_runs(add)
    _add_tools(add)
    return parser


def _add_recipes_and_runs(add: _Add) -> None:
    command = add(_list_command, "recipes and studies, with a line each")
    _add_json(command)
    command = add(_show, "the resolved, checked recipe as YAML")
    _add_recipe(command)
    _add_json(command)
    command = add(_train, "train here, on one node; Ctrl-C saves and stops")
    _add_recipe(command)
    command.add_argument("--nproc", type=int, help="ranks; must be what the layout multiplies to")
    command.add_argument("--run-dir", type=Path, help="default: runs/RECIPE-TIME-RANDOM")
    command = add(_resume, "continue a run from its newest checkpoint")
    _add_run_dir(command)
    _add_overrides(command)
    command = add(_launch, "submit to Slurm, Kubernetes, Kubeflow or Volcano")
    _add_recipe(command)
    add_launch_options(command)
    command = add(_status, "state and last step of a run")
    _add_run_dir(command)
    _add_json(command)
    command = add(_logs, "what the ranks of the newest attempt printed")
    _add_run_dir(command)
    command.add_argument("--rank", type=int, help="one rank only")


def _add_tools(add: _Add) -> None:
    add_data_actions(add(_data, "make shards to train on, check and count them"))
    add_checkpoint_actions(add(_checkpoint, "look into checkpoints, check and convert them"))
    command = add(_parity, "compare layouts with one rank, gradient by gradient")
    _add_recipe(command)
    command.add_argument(
        "--layout",
        action="append",
        required=True,
        metavar="AXES",
        help="axis and size, comma-joined, such as dp2,ep2; dp, dpr (replicas), tp, pp, cp, ep; "
        "may be given several times",
    )
    command.add_argument(
        "--dtype", choices=["fp64", "fp32"], help="default: fp64 where the backend has it"
    )
    command.add_argument("--steps", type=int, default=1, help="optimizer steps (default: 1)")
    _add_json(command)
    command = add(_bench, "a benchmark of the project, beside a peer")
    command.add_argument("name", metavar="NAME")
    _add_json(command)
    command = add(_dash, "live page of loss curves on 127.0.0.1")
    command.add_argument("runs_dir", metavar="RUNS_DIR", nargs="?", type=Path, default=Path("runs"))
    command.add_argument("--port", type=int, default=8765)
    command = add(_ablate, "run a study, then write its report")
    command.add_argument("study", metavar="STUDY", help="a name of `mneme list`, or a YAML file")
    command.add_argument("--seeds", type=int, help="default: what the study says")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"))
    command.add_argument("-o", "--output", type=Path, help="report; default: beside the runs")
    _add_overrides(command)
    command = add(_report, "compare runs on one page")
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    command.add_argument("-o", "--output", type=Path, default=Path("report"))
    add_doctor_options(add(_doctor, "check environment, backends and collectives of this machine"))


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a name of `mneme list`, or a YAML file")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="such as train.steps=200"
    )


def _add_run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", metavar="RUN_DIR", type=Path)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="answer as one JSON object")


def _list_command(options: argparse.Namespace) -> int:
    from launch.catalog import descriptions  # noqa: PLC0415

    found = {"recipes": descriptions("experiment"), "studies": descriptions("study")}
    if options.json:
        rows = {
            kind: [{"name": name, "description": line} for name, line in lines.items()]
            for kind, lines in found.items()
        }
        print(json.dumps(rows, indent=2))
        return 0
    for kind, lines in found.items():
        print(f"{kind}:")
        for name, line in lines.items():
            print(f"  {name:<16} {line}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from launch.compose import compose  # noqa: PLC0415
    from train.recipe import to_plain, to_yaml  # noqa: PLC0415

    config = compose(options.recipe, options.overrides).config
    print(json.dumps(to_plain(config), indent=2) if options.json else to_yaml(config).rstrip())
    return 0


def _train(options: argparse.Namespace) -> int:
    from launch.start import train  # noqa: PLC0415

    return train(options.recipe, options.overrides, nproc=options.nproc, run_dir=options.run_dir)


def _resume(options: argparse.Namespace) -> int:
    from launch.start import resume  # noqa: PLC0415

    return resume(options.run_dir, options.overrides)


def _launch(options: argparse.Namespace) -> int:
    from launch.cluster.command import launch  # noqa: PLC0415

    return launch(options)


def _status(options: argparse.Namespace) -> int:
    from launch.inspect_run import print_status  # noqa: PLC0415

    return print_status(options.run_dir, as_json=options.json)


def _logs(options: argparse.Namespace) -> int:
    from launch.inspect_run import print_logs  # noqa: PLC0415

    return print_logs(options.run_dir, rank=options.rank)


def _data(options: argparse.Namespace) -> int:
    from launch.data_command import run_data  # noqa: PLC0415

    return run_data(options)


def _checkpoint(options: argparse.Namespace) -> int:
    from launch.checkpoint_command import run_checkpoint  # noqa: PLC0415

    return run_checkpoint(options)


def _parity(options: argparse.Namespace) -> int:
    from launch.parity.command import parity  # noqa: PLC0415

    return parity(
        options.recipe,
        options.overrides,
        layouts=options.layout,
        dtype=options.dtype,
        steps=options.steps,
        as_json=options.json,
    )


def _bench(options: argparse.Namespace) -> int:
    from launch.bench import bench  # noqa: PLC0415

    return bench(options.name, as_json=options.json)


def _dash(options: argparse.Namespace) -> int:
    from launch.dash.server import serve  # noqa: PLC0415

    serve(options.runs_dir, options.port)
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from launch.study import run_study  # noqa: PLC0415

    return run_study(
        options.study,
        seeds=options.seeds,
        runs_dir=options.runs_dir,
        overrides=options.overrides,
        output=options.output,
    )


def _report(options: argparse.Namespace) -> int:
    from launch.report import write_report  # noqa: PLC0415

    print(f"report: {write_report(options.runs, options.output)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from launch.doctor.command import run_doctor  # noqa: PLC0415

    return run_doctor(options)


if __name__ == "__main__":
    sys.exit(main())
