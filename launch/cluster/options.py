"""What `mneme launch` takes. Imports nothing, so that `mneme --help` stays instant."""

import argparse
from pathlib import Path
from typing import Literal, get_args

Platform = Literal["slurm", "k8s", "kubeflow", "volcano"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options beside a recipe and overrides."""
    command.add_argument("--on", choices=PLATFORMS, required=True, help="where to run")
    command.add_argument(
        "--dry-run", action="store_true", help="show the file; submit and make nothing"
    )
    command.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write the file; do not submit it"
    )
    command.add_argument(
        "--run-dir", type=Path, help="default: runs/RECIPE-TIME-RANDOM; for pods below the volume"
    )
