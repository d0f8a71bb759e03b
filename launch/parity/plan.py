"""From what was typed to runs that are checked before any is started; called by `command`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from launch.compose import RecipeError, compose
from launch.layouts import AXES, TypedLayout, key
from launch.parity.blame import suspects
from launch.start import obstacles
from train.config import RunConfig
from train.stages import phases

Dtype = Literal["fp64", "fp32"]

ONE_RANK = TypedLayout()

_SMALLEST_EPS = 1e-8
"""With less, AdamW's update is the sign of a gradient, which may be nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of a comparison."""

    recipe: str
    overrides: list[str]
    """Of all runs."""
    layouts: list[TypedLayout]
    reference: RunConfig
    """The recipe on one rank."""
    noise: RunConfig | None
    """fp32: the same with another number of microbatches."""
    steps: int
    notes: list[str]
    """What is not as the recipe says."""

    def config(self, layout: TypedLayout) -> RunConfig:
        """The recipe on a layout.

        Raises:
            RecipeError: the layout does not fit the recipe.
        """
        return compose(self.recipe, [*self.overrides, *layout.overrides()]).config

    def data_sizes(self) -> tuple[int, ...]:
        """Data-parallel sizes of all layouts that may be run."""
        asked = {part for layout in self.layouts for part in suspects(layout)}
        return tuple(sorted({layout.data_size for layout in {ONE_RANK, *self.layouts, *asked}}))


def make_plan(
    recipe: str, overrides: Sequence[str], layouts: Sequence[str], dtype: str | None, steps: int
) -> Plan:
    """Check everything that was typed.

    Args:
        recipe: name or file.
        overrides: of all runs.
        layouts: such as `dp2,ep2`.
        dtype: fp64 or fp32; None: fp64 where the backend has it.
        steps: optimizer steps.

    Raises:
        RecipeError: with every mistake.
    """
    parsed, problems = _parse(layouts)
    common = []
    for text in overrides:
        problem = _reserved(text)
        problems += [problem] if problem else []
        common += [] if problem else [text]
    try:
        reference = compose(recipe, [*common, *ONE_RANK.overrides()]).config
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from error
    if not 1 <= steps <= reference.train.steps:
        problems.append(
            f"--steps {steps}: the recipe has train.steps={reference.train.steps}; use 1 to that, "
            "or raise it"
        )
    if reference.parallel.data_engine == "deepspeed":
        problems.append(
            "parallel.data_engine=deepspeed: keeps gradients to itself, and they are what is compared; "
            "use parallel.data_engine=fsdp"
        )
    problems += _layout_problems(recipe, common, parsed)
    if problems := problems or obstacles(reference):
        raise RecipeError(problems)
    common.append(f"train.dtype={_choose_dtype(dtype, reference.parallel.backend)}")
    notes, eps = [], reference.optim.eps
    if eps < _SMALLEST_EPS and not any(text.startswith("optim.eps=") for text in common):
        common.append(f"optim.eps={_SMALLEST_EPS}")
        notes.append(
            f"optim.eps={_SMALLEST_EPS:g} in place of {eps:g}, with which an update may be the sign "
            "of rounding"
        )
    plan = Plan(
        recipe=recipe,
        overrides=common,
        layouts=parsed,
        reference=reference,
        noise=None,
        steps=steps,
        notes=notes,
    )
    reference = plan.config(ONE_RANK)
    noise = None if reference.train.dtype == "fp64" else _noise(plan, reference)
    return replace(plan, reference=reference, noise=noise)


def _parse(layouts: Sequence[str]) -> tuple[list[TypedLayout], list[str]]:
    """The layouts, each once, and what is wrong with others."""
    found: dict[TypedLayout, None] = {}
    problems: list[str] = []
    for text in layouts:
        try:
            found[TypedLayout.parse(text)] = None
        except ValueError as error:
            problems += str(error).split("\n")
    return list(found), problems


def _reserved(override: str) -> str | None:
    """Why an override may not be typed here."""
    name = override.partition("=")[0].strip()
    if name in map(key, AXES):
        return f"{override}: the layouts say the sizes of axes; use --layout, such as dp2,ep2"
    if name == "train.dtype":
        return f"{override}: use --dtype, with {' or '.join(get_args(Dtype))}"
    return None


def _layout_problems(recipe: str, overrides: list[str], layouts: list[TypedLayout]) -> list[str]:
    problems = []
    for layout in layouts:
        try:
            compose(recipe, [*overrides, *layout.overrides()])
        except RecipeError as error:
            problems += [f"--layout {layout}: {problem}" for problem in error.problems]
    return problems


def _choose_dtype(dtype: str | None, backend_name: str) -> Dtype:
    # torch, which takes seconds: after all other mistakes.
    from parallel.backend.select import select_backend  # noqa: PLC0415

    try:
        backend = select_backend(backend_name)
    except RuntimeError as error:
        raise RecipeError([str(error)]) from error
    if dtype == "fp64" and not backend.capabilities.fp64:
        raise RecipeError([f"--dtype fp64: backend {backend.name} has none; use --dtype fp32"])
    return cast(Dtype, dtype or ("fp64" if backend.capabilities.fp64 else "fp32"))


def _noise(plan: Plan, reference: RunConfig) -> RunConfig:
    """One rank that computes the same in microbatches of another size.

    Raises:
        RecipeError: there is no other size.
    """
    phase = phases(reference)[0]
    size, batch = phase.micro_batch_size, phase.global_batch_size
    others = [n for n in range(1, batch + 1) if batch % n == 0 and (size % n == 0 or size == 1)]
    others = [n for n in others if n != size]
    if others:
        size = others[0] if size == 1 else others[-1]
        changed = replace(plan, overrides=[*plan.overrides, f"train.micro_batch_size={size}"])
        noise = changed.config(ONE_RANK)
        if phases(noise)[0].micro_batch_size == size:
            return noise
    raise RecipeError(
        [
            f"--dtype fp32: rounding is measured with another train.micro_batch_size than "
            f"{phase.micro_batch_size}, and the first stage of the recipe allows none; use --dtype "
            "fp64, or train.global_batch_size=2 or more"
        ]
    )
