"""From a study to its trials: overrides, steps, controls, and what is wrong before anything runs.

`launch.study` calls this. An arm differs from the others in its overrides and in nothing else: data,
tokens, seeds and evaluation are checked to be the same here, and in the runs by
`launch.study_checks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.compare import differences
from launch.compose import RecipeError, change, compose
from launch.study_config import StudyConfig
from launch.study_size import control_overrides, tokens_per_step
from train.config import RunConfig
from train.recipe import load_resolved, to_plain

_SET_BY_THE_STUDY = {
    "train.seed": "a study sets the seeds itself; use --seeds N",
    "train.steps": "a study computes the steps; change budget_tokens in its file",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One arm at one seed."""

    arm: str
    seed: int
    overrides: list[str]
    run_dir: Path
    config: RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class _Arm:
    """An arm before it has a seed."""

    typed: list[str]
    config: RunConfig


def plan_trials(
    config: StudyConfig, num_seeds: int, directory: Path, overrides: Sequence[str]
) -> list[Trial]:
    """Compose every trial, seed by seed, and check it against what is on disk.

    Args:
        config: the study.
        num_seeds: seeds 0, 1, ...
        directory: where its runs are.
        overrides: for all arms, after the study's own and before those of the arm.

    Raises:
        ValueError: with every mistake that was found.
    """
    if num_seeds < 1:
        raise ValueError(f"seeds={num_seeds}: at least 1; use --seeds {config.seeds}")
    common = [*config.overrides, *overrides]
    problems = [
        f"{text}: {rule}"
        for text in [*common, *(text for changes in config.arms.values() for text in changes)]
        for key, rule in _SET_BY_THE_STUDY.items()
        if text.startswith(f"{key}=")
    ]
    arms: dict[str, _Arm] = {}
    if not problems:
        for name, changes in config.arms.items():
            try:
                arms[name] = _arm(config, [*common, *changes])
            except RecipeError as error:
                problems += [f"{name}: {line}" for line in error.problems]
    if not problems:
        problems = _add_controls(config, arms)
    problems = problems or [*_not_alike(arms), *_the_same(arms)]
    if problems:
        raise ValueError(f"study {config.name}:\n" + "\n".join(dict.fromkeys(problems)))
    trials = [
        _trial(name, arm, seed, directory)
        for seed in range(num_seeds)
        for name, arm in arms.items()
    ]
    if problems := [line for trial in trials for line in _check_same_recipe(trial)]:
        raise ValueError(f"study {config.name}:\n" + "\n".join(problems))
    return trials


def _arm(config: StudyConfig, typed: list[str]) -> _Arm:
    """Compose with the steps that the budget buys."""
    recipe = compose(config.recipe, typed).config
    if recipe.train.stages or recipe.train.batch_size_ramp:
        raise RecipeError(
            [
                "train.stages, train.batch_size_ramp: a study has one batch size, from which the "
                "steps follow; use train.stages=[] train.batch_size_ramp=null"
            ]
        )
    per_step = tokens_per_step(recipe)
    steps, left = divmod(config.budget_tokens, per_step)
    if left or not steps:
        nearest = max(1, round(config.budget_tokens / per_step)) * per_step
        raise RecipeError(
            [
                f"budget_tokens={config.budget_tokens}: must be a multiple of train.global_batch_size"
                f"={recipe.train.global_batch_size} x data.sequence_length="
                f"{recipe.data.sequence_length}; use {nearest}"
            ]
        )
    budget = f"train.steps={steps}"
    return _Arm(typed=[*typed, budget], config=change(recipe, [budget], ["train.steps"]))


def _add_controls(config: StudyConfig, arms: dict[str, _Arm]) -> list[str]:
    """Compute the overrides of the controls; returns what is wrong."""
    problems = []
    for name, control in config.controls.items():
        base, target = arms[control.base], arms[control.match]
        try:
            changes = control_overrides(base.config, control, target.config)
            keys = [text.partition("=")[0] for text in changes]
            arms[name] = _Arm(
                typed=[*base.typed, *changes], config=change(base.config, changes, keys)
            )
        except RecipeError as error:
            problems += [f"controls.{name}: {line}" for line in error.problems]
    return problems


def _not_alike(arms: dict[str, _Arm]) -> list[str]:
    """Arms have to see the same data in the same batches, and be evaluated alike."""
    (first, reference), *others = arms.items()
    return [
        f"{name}: {change}, not as in {first}: arms differ in the model or how it is trained, never in "
        "data, batches or evaluation; move it to the study's overrides"
        for name, arm in others
        for change in differences(_shared(reference.config), _shared(arm.config))
    ]


def _shared(config: RunConfig) -> dict[str, Any]:
    plain = to_plain(config)
    train = {key: plain["train"][key] for key in ("global_batch_size", "steps")}
    return {"data": plain["data"], "evaluate": plain["evaluate"], "train": train}


def _the_same(arms: dict[str, _Arm]) -> list[str]:
    named = list(arms.items())
    return [
        f"{a} and {b}: the same recipe; an override for all arms undoes their difference?"
        for i, (a, first) in enumerate(named)
        for b, second in named[i + 1 :]
        if first.config == second.config
    ]


def _trial(name: str, arm: _Arm, seed: int, directory: Path) -> Trial:
    train = replace(arm.config.train, seed=seed)
    return Trial(
        arm=name,
        seed=seed,
        overrides=[*arm.typed, f"train.seed={seed}"],
        run_dir=directory / f"{name}-seed{seed}",
        config=replace(arm.config, train=train),
    )


def _check_same_recipe(trial: Trial) -> list[str]:
    """A run that is already there has to be of this recipe, or it would answer another question."""
    path = trial.run_dir / "recipe.yaml"
    if not path.is_file():
        return []
    changed = list(differences(to_plain(load_resolved(path)), to_plain(trial.config)))
    if not changed:
        return []
    return [
        f"{trial.run_dir}: holds a run of another recipe, this one has {', '.join(changed)}; "
        "remove the directory or use another --runs-dir"
    ]
