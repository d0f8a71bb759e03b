"""`mneme train` and `mneme resume`: from checked recipe to finished attempt and summary.

`launch.cli` calls these; what runs the ranks is `launch.local`. No torch.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from launch.compose import Recipe, RecipeError, change, compose
from launch.corpus import corpus_problems
from launch.local import run_ranks
from launch.run_dir import (
    RunDirError,
    held,
    new_run_dir,
    started_in,
    write_environment,
    write_recipe,
)
from launch.runs import next_token_loss, read_metrics, read_status
from launch.schema import flatten, show
from parallel.config import BackendName
from train.checkpoint.commit import choose, holds_only_weights
from train.checkpoint.geometry import FRESH, differences, recipe_geometry, refusal
from train.config import RunConfig
from train.recipe import load_resolved

CHANGEABLE = (
    *("train.steps", "train.micro_batch_size"),
    *("data.num_workers", "data.prefetch_batches", "data.faults", "data.weight_schedule"),
    *("checkpoint", "evaluate", "monitor", "launch", "cluster", "parallel"),
)
"""What may change when a run goes on: how long and how it is run, not what is learned from what."""
CHANGEABLE_WITH_FRESH_TABLES = (
    *("model.engram.rows_per_head", "model.engram.seed", "model.engram.pad_token_id"),
    "optim.engram_optimizer",
)
"""What may change as well if Engram's tables start at zero again."""
CHANGEABLE_BEFORE_TRAINING = (*("train", "data", "optim"), *CHANGEABLE)
"""What may change while a run holds imported weights and nothing has been trained."""


def train(recipe: str, overrides: Sequence[str], *, nproc: int | None, run_dir: Path | None) -> int:
    """Train a recipe in a new run directory; returns the exit code of the command.

    Raises:
        RecipeError, RunDirError: the user's input is wrong; nothing was started.
    """
    composed = compose(recipe, overrides, nproc=nproc)
    path = _prepare(composed, run_dir)
    print(f"run directory: {path}", flush=True)
    return _run_and_summarize(path, composed.config)


def _prepare(recipe: Recipe, run_dir: Path | None) -> Path:
    """Check that the corpus is there and make the run directory that ranks can start from.

    Raises:
        RecipeError: the corpus is missing or does not fit.
        RunDirError: the directory is in use.
    """
    if problems := [*_several_nodes(recipe.config), *obstacles(recipe.config)]:
        raise RecipeError(problems)
    path = new_run_dir(recipe.config.name, run_dir)
    write_environment(path)
    write_recipe(path, recipe.config, recipe.overrides)
    return path


def resume(run_dir: Path, overrides: Sequence[str]) -> int:
    """Continue a run from its newest checkpoint; returns the exit code of the command.

    Raises:
        RecipeError, RunDirError: the user's input is wrong; nothing was started.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise RunDirError(f"{run_dir}: holds no run (no recipe.yaml); `mneme train` starts one")
    with held(run_dir):  # refused here if another launcher has it
        pass
    before = load_resolved(run_dir / "recipe.yaml")
    choice = choose(run_dir)
    newest = choice.newest
    begun = newest is None or not holds_only_weights(newest[1])
    asked = _with_fresh_tables_spent(before, newest)
    config = change(asked, overrides, _changeable(asked, overrides, begun=begun))
    if problems := [*_several_nodes(config), *obstacles(config)]:
        raise RecipeError([*problems, *_started_elsewhere(run_dir)])
    if newest and config.model.engram is not None:
        found = differences(newest[1], config, recipe_geometry(config))
        if problems := refusal(found, config, run_dir):
            raise RecipeError(problems)
    step = newest[0] if newest else 0
    if step >= config.train.steps:
        print(
            f"{run_dir}: all {config.train.steps} steps are done; to go on, type\n"
            f"  mneme resume {run_dir} train.steps={2 * step}"
        )
        return 0
    for skipped in (*choice.damaged, *choice.leftovers):
        print(f"skipped {skipped}")
    print(f"{run_dir}: continuing after step {step} of {config.train.steps}")
    for line in _differences(before, config):
        print(f"  {line}")
    write_environment(run_dir)
    if config != before:
        write_recipe(run_dir, config, overrides)
    return _run_and_summarize(run_dir, config)


def _with_fresh_tables_spent(config: RunConfig, newest: tuple[int, Path] | None) -> RunConfig:
    """Fresh tables are for the change for which they were typed: refuse again once they are saved.

    Until then a run may fail and go on as often as it likes; afterwards another change, or a
    checkpoint that knows of no tables, would take away what has been trained since.
    """
    if config.checkpoint.unfit_tables == "refuse" or newest is None or config.model.engram is None:
        return config
    if differences(newest[1], config, recipe_geometry(config)):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, unfit_tables="refuse"))


def _changeable(before: RunConfig, overrides: Sequence[str], *, begun: bool) -> tuple[str, ...]:
    """Keys and sections that may change.

    Raises:
        RecipeError: an override changes Engram's tables and does not say that they start fresh.
    """
    fresh = FRESH in overrides or before.checkpoint.unfit_tables == "fresh"
    changed = [text for text in overrides if text.startswith(CHANGEABLE_WITH_FRESH_TABLES)]
    if changed and not fresh:
        raise RecipeError(
            [
                f"{text}: rows that were trained would mean something else; leave it out, or add "
                f"{FRESH} to keep everything else and start Engram's tables at zero"
                for text in changed
            ]
        )
    allowed = CHANGEABLE if begun else CHANGEABLE_BEFORE_TRAINING
    return (*CHANGEABLE_WITH_FRESH_TABLES, *allowed) if fresh else allowed


def obstacles(config: RunConfig) -> list[str]:
    """Why a valid recipe cannot be trained here."""
    problems = corpus_problems(config)
    name, where = config.parallel.backend, "parallel.backend"
    if chosen := os.environ.get("MNEME_BACKEND"):
        name, where = cast(BackendName, chosen), "MNEME_BACKEND"
    known = get_args(BackendName)
    if name not in known:
        problems.append(f"{where}={name}: no such backend; use one of {', '.join(known)}")
    elif name == "dry":
        problems.append(f"{where}=dry: plans only, its tensors have no memory; use auto")
    return problems


def _several_nodes(config: RunConfig) -> list[str]:
    """This command starts ranks on one node only."""
    if config.launch.nodes == 1:
        return []
    return [
        f"launch.nodes={config.launch.nodes}: this command runs on one node; use launch.nodes=1 to "
        "have all ranks here, `mneme launch` for a cluster, or `python -m launch.node` on each node"
    ]


def _started_elsewhere(run_dir: Path) -> list[str]:
    """A hint for a corpus that is not found: its path may be relative to another directory."""
    directory = started_in(run_dir)
    if directory is None or directory == Path.cwd():
        return []
    return [f"the run was started in {directory}: go there, or make the paths absolute"]


def _differences(before: RunConfig, after: RunConfig) -> list[str]:
    """`key: old -> new` for every value that differs."""
    old, new = flatten(before), flatten(after)
    return [
        f"{key}: {show(old.get(key))} -> {show(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _run_and_summarize(run_dir: Path, config: RunConfig) -> int:
    started = time.monotonic()
    code = run_ranks(run_dir, config)
    seconds = time.monotonic() - started
    status = read_status(run_dir)
    losses = [loss for row in read_metrics(run_dir) if (loss := next_token_loss(row)) is not None]
    print(f"{status['state']} after {seconds:.0f} s, at step {status['step']}: {run_dir}")
    if losses:
        print(f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    for command, purpose in _next_commands(run_dir, config, str(status["state"])):
        print(f"  {command:<60} {purpose}")
    return code


def _next_commands(run_dir: Path, config: RunConfig, state: str) -> list[tuple[str, str]]:
    if state == "done":
        longer = f"mneme resume {run_dir} train.steps={2 * config.train.steps}"
        return [
            (f"mneme dash {run_dir.parent}", "curves in the browser"),
            (longer, "train on"),
            ("mneme ablate engram", "what the memory is worth"),
        ]
    return [(f"mneme resume {run_dir}", "continue"), (f"mneme logs {run_dir}", "what ranks said")]
