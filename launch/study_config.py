"""What a study is: `recipes/study/NAME.yaml`, or a user's file. No torch."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from launch.catalog import options

HELD_OUT_LOSS = "validation/loss"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Names become directories."""
Reduction = Literal["last", "max", "min"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """An arm that the tool makes: one of the arms, grown or shrunk to the size of another."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    base: str
    """The arm whose overrides it has."""
    match: str
    """The arm whose size it gets."""
    parameters: str | None = None
    """Key that is varied until the total of the parameters is that of `match`."""
    flops: str | None = None
    """Key that is varied until the training FLOPs of a token are those of `match`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """A claim that the runs decide: of one arm against another, or of an arm and a bound."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Name
    statement: str
    """The claim as a sentence; the report says whether it is supported."""
    arm: str
    against: str | None = None
    """The arm to compare with, seed by seed; null: the claim is about a bound."""
    metric: str = HELD_OUT_LOSS
    """A name in metrics.jsonl."""
    reduce: Reduction = "last"
    """What of the metric stands for a run: its last value, the largest or the smallest."""
    direction: Literal["lower", "higher"] = "lower"
    """Where the arm is claimed to lie in comparison with `against`."""
    above: float | None = None
    """Claimed lower bound, where there is no `against`."""
    below: float | None = None
    """Claimed upper bound, where there is no `against`."""

    @property
    def label(self) -> str:
        """The number that is compared."""
        return self.metric if self.reduce == "last" else f"{self.reduce} of {self.metric}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A study."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Name
    description: str
    """One line for `mneme list`."""
    question: str
    """What the study asks."""
    expectation: str
    """What the literature leads one to expect, with sources."""
    scale_note: str
    """What a study of this size can show, and what it cannot."""
    recipe: str
    """What all arms start from: a recipe's name or file."""
    overrides: list[str] = field(default_factory=list)
    """For all arms, before those of the arm."""
    arms: Annotated[dict[Name, list[str]], Field(min_length=2)]
    """Name -> its overrides. The first arm is the reference for sizes and costs."""
    controls: dict[Name, Control] = field(default_factory=dict)
    """Name -> a further arm, whose overrides are computed."""
    hypotheses: Annotated[list[Hypothesis], Field(min_length=1)]
    curves: list[str] = field(default_factory=list)
    """Metrics to draw besides the training loss and those of the hypotheses."""
    budget_tokens: Annotated[int, Field(ge=1, strict=True)]
    """Tokens that every run trains on; the optimizer steps follow from it."""
    seeds: Annotated[int, Field(ge=1, strict=True)] = 3
    """Seeds 0, 1, ... that every arm trains with."""

    @property
    def arm_names(self) -> list[str]:
        """Arms, then controls."""
        return [*self.arms, *self.controls]


def load_study(study: str) -> StudyConfig:
    """Read a study by its name under `recipes/study/`, or from a user's file.

    Raises:
        ValueError: no such study, or not a valid one; lists everything that is wrong.
    """
    known = options("study")
    path = known.get(study, Path(study))
    if not path.is_file():
        near = ", ".join(get_close_matches(study, known, n=3) or known)
        raise ValueError(f"{study}: no such study; use {near}, or give a path to a .yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = TypeAdapter(StudyConfig).validate_python(content)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [_problem(details) for details in error.errors(include_url=False)]
        raise ValueError(f"{path}: not a study:\n" + "\n".join(lines)) from error
    if problems := [*_controls(config), *_hypotheses(config)]:
        raise ValueError(f"{path}: not a study:\n" + "\n".join(problems))
    return config


def _problem(details: ErrorDetails) -> str:
    *place, last = ["", *details["loc"]]
    if last == "[key]":
        return f'{place[1]}: {details["input"]}: a name has to be text; put it in quotes, like "on"'
    return f"{'.'.join(map(str, [*place[1:], last])) or 'file'}: {details['msg']}"


def _controls(config: StudyConfig) -> list[str]:
    problems = []
    for name, control in config.controls.items():
        place = f"controls.{name}"
        if name in config.arms:
            problems.append(f"{place}: is an arm too; use another name")
        problems += [
            f"{place}.{key}={arm}: no such arm; use {', '.join(config.arms)}"
            for key, arm in (("base", control.base), ("match", control.match))
            if arm not in config.arms
        ]
        if control.parameters is None and control.flops is None:
            problems.append(
                f"{place}: varies nothing; for example parameters: model.moe.num_experts"
            )
    return problems


def _hypotheses(config: StudyConfig) -> list[str]:
    problems = []
    for number, claim in enumerate(config.hypotheses):
        place = f"hypotheses.{number}"
        for key in ("arm", "against"):
            arm = getattr(claim, key)
            if arm is not None and arm not in config.arm_names:
                problems.append(
                    f"{place}.{key}={arm}: no such arm; use {', '.join(config.arm_names)}"
                )
        bounded = claim.above is not None or claim.below is not None
        if bounded == (claim.against is not None):
            problems.append(
                f"{place}: compares with nothing or with two things; give either against, or above "
                "and below"
            )
        if claim.arm == claim.against:
            problems.append(f"{place}.against={claim.arm}: is the arm itself; use another")
    return problems
