"""`mneme launch RECIPE --on PLATFORM`: check a recipe, write the job's file, submit it. No torch."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.cluster import kubeflow, kubernetes, slurm, volcano
from launch.cluster.options import PLATFORMS, Platform
from launch.cluster.spec import LaunchSpec, ignored, make_spec, problems
from launch.compose import Recipe, RecipeError, compose
from launch.run_dir import new_run_dir, run_name, write_environment, write_recipe
from launch.start import obstacles
from train.events import append_event

_RENDERERS: dict[Platform, Callable[[LaunchSpec], str]] = {
    "slurm": slurm.render,
    "k8s": kubernetes.render,
    "kubeflow": kubeflow.render,
    "volcano": volcano.render,
}
_KINDS = {"k8s": "job", "kubeflow": "trainjob", "volcano": "vcjob"}
_TOOLS: dict[Platform, str] = dict.fromkeys(PLATFORMS, "kubectl") | {"slurm": "sbatch"}
_FILE = "job.sbatch"
_INDEX_0 = "batch.kubernetes.io/job-completion-index=0"
_NODE_0 = {
    "k8s": "batch.kubernetes.io/job-name={}," + _INDEX_0,
    "kubeflow": "jobset.sigs.k8s.io/jobset-name={}," + _INDEX_0,
    "volcano": "volcano.sh/job-name={},volcano.sh/task-index=0",
}
"""Labels of the pod of node 0."""


def launch(options: argparse.Namespace) -> int:
    """Check, render and submit; returns the exit code of the command.

    Raises:
        RecipeError, RunDirError: the user's input is wrong; nothing was submitted.
    """
    platform: Platform = options.on
    recipe = compose(options.recipe, options.overrides)
    config = recipe.config
    found = list(problems(config, platform))
    if platform == "slurm":  # pods see another file system
        found += obstacles(config)
    if found:
        raise RecipeError(found)
    for key in ignored(config.cluster, platform):
        print(f"{key}: has no meaning with --on {platform}", file=sys.stderr)
    submits = not options.dry_run and options.output is None
    if submits and shutil.which(_TOOLS[platform]) is None:
        raise ValueError(
            f"--on {platform}: {_TOOLS[platform]} is not installed here; type this where it is, or "
            "add -o FILE and submit that file there"
        )
    if platform == "slurm":
        return _launch_slurm(recipe, options, submits)
    return _launch_pods(recipe, options, platform, submits)


def _launch_slurm(recipe: Recipe, options: argparse.Namespace, submits: bool) -> int:
    config = recipe.config
    run_dir: Path = (options.run_dir or Path("runs") / run_name(config.name)).absolute()
    text = slurm.render(make_spec(config, run_dir, Path.cwd()))
    if options.dry_run:
        print(text, end="")
        return 0
    new_run_dir(config.name, run_dir)
    (run_dir / "logs").mkdir()
    write_environment(run_dir)
    write_recipe(run_dir, config, recipe.overrides)
    file: Path = options.output or run_dir / _FILE
    file.write_text(text, encoding="utf-8")
    if not submits:
        _print_next(run_dir, [(f"sbatch {file}", "submit it")])
        return 0
    job = _submit(["sbatch", "--parsable", str(file)]).partition(";")[0]
    append_event(run_dir, step=0, rank=0, event="submit", detail=f"slurm job {job}")
    print(f"submitted job {job}: {file}")
    _print_next(
        run_dir,
        [
            (f"squeue --job {job}", "its place in the queue"),
            (f"scancel --batch --signal=USR1 {job}", "save now, and queue it again"),
            (f"scancel --signal=TERM {job}", "save now, and end it"),
            (f"scancel {job}", "end it, without waiting long for a checkpoint"),
            (f"sbatch {file}", "go on with it later"),
        ],
    )
    return 0


def _launch_pods(
    recipe: Recipe, options: argparse.Namespace, platform: Platform, submits: bool
) -> int:
    config = recipe.config
    volume = config.cluster.volume_path
    run_dir = Path(volume) / (options.run_dir or Path("runs") / run_name(config.name))
    if not run_dir.is_relative_to(volume):
        raise ValueError(
            f"--run-dir {run_dir}: must lie on the volume of the pods, cluster.volume_path={volume}"
        )
    spec = make_spec(config, run_dir, volume)
    text = _RENDERERS[platform](spec)
    if options.dry_run:
        print(text, end="")
        return 0
    file: Path = options.output or Path(f"{spec.name}.yaml")
    file.write_text(text, encoding="utf-8")
    kubectl = f"kubectl -n {config.cluster.namespace}"
    if submits:
        print(_submit(["kubectl", "apply", "-f", str(file)]))
    _print_next(
        run_dir,
        [
            *([] if submits else [(f"kubectl apply -f {file}", "submit it")]),
            (f"{kubectl} get {_KINDS[platform]} {spec.name}", "its state"),
            (f"{kubectl} logs -f -l {_NODE_0[platform].format(spec.name)}", "progress"),
            (f"kubectl delete -f {file}", "save, and end it; apply it again to go on"),
        ],
    )
    return 0


def _submit(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _print_next(run_dir: Path, commands: list[tuple[str, str]]) -> None:
    seen = [
        (f"mneme status {run_dir}", "state and last step"),
        (f"mneme logs {run_dir}", "what ranks said"),
    ]
    for command, purpose in [*seen, *commands]:
        print(f"  {command:<60} {purpose}")
