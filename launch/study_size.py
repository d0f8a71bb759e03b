"""How large the arms of a study are, and the override that makes a control as large as an arm.

Sizes are read off the model itself, built without memory. Called by `launch.study_plan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from launch.compose import RecipeError, change
from launch.schema import flatten
from launch.study_config import Control
from train.config import RunConfig
from train.model.config import ModelConfig
from train.model.count import count_parameters
from train.model.flops import training_flops

_LARGEST_STEP = 1024
_MOST_ROUNDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What a model has and does."""

    parameters: int
    """All that is trained, blocks of multi-token prediction included."""
    active_parameters: int
    """What is multiplied with for a token: no tables, and of the routed experts the token's only."""
    flops_per_token: float
    """Of forward and backward pass, by `train.model.flops`."""


def size_of(config: RunConfig) -> Size:
    """Size of the model of a recipe, at its sequence length."""
    return _size(config.model, config.data.sequence_length)


@cache
def _size(config: ModelConfig, length: int) -> Size:
    """Count; a second for the largest models."""
    count = count_parameters(config)
    return Size(
        parameters=count.total + count.mtp,
        active_parameters=count.active,
        flops_per_token=training_flops(config, length),
    )


def control_overrides(start: RunConfig, control: Control, target: RunConfig) -> list[str]:
    """Overrides that give an arm the size of another as nearly as legal values allow.

    Args:
        start: the arm that the control is made from.
        control: says what is varied.
        target: the arm whose size is wanted.

    Raises:
        RecipeError: a key cannot be varied.
    """
    wanted = size_of(target)
    goals: list[tuple[str, Callable[[Size], float]]] = []
    if control.flops is not None:
        goals.append((control.flops, lambda size: size.flops_per_token))
    if control.parameters is not None:
        goals.append((control.parameters, lambda size: size.parameters))
    config, values = start, dict.fromkeys((key for key, _ in goals), 0)
    for _ in range(_MOST_ROUNDS):  # one key may move the other's goal a little
        before = dict(values)
        for key, measure in goals:
            values[key] = _Search(config, key, measure).nearest(measure(wanted))
            config = change(config, [f"{key}={values[key]}"], [key])
        if values == before:
            break
    return [f"{key}={value}" for key, value in values.items()]


class _Search:
    """One integer key of a recipe, on which a size depends (almost) linearly."""

    def __init__(self, config: RunConfig, key: str, measure: Callable[[Size], float]) -> None:
        self._config, self._key, self._measure = config, key, measure
        start = flatten(config).get(key)
        if not isinstance(start, int) or isinstance(start, bool):
            raise RecipeError([f"{key}={start}: a control varies a whole number; name such a key"])
        self._start: int = start
        self._here = measure(size_of(config))

    def nearest(self, goal: float) -> int:
        """The legal value whose size is nearest to the goal.

        Raises:
            RecipeError: the size does not depend on the key, or no other value is legal.
        """
        step, slope = self._step()
        steps = round((goal - self._here) / slope)
        values = (self._start + n * step for n in (steps - 1, steps, steps + 1))
        sizes = {value: size for value in values if (size := self._size(value)) is not None}
        if not sizes:
            raise RecipeError([f"{self._key}: no legal value gives the size; name another key"])
        return min(sizes, key=lambda value: abs(sizes[value] - goal))

    def _step(self) -> tuple[int, float]:
        """The smallest power of two by which the key may grow, and what that adds to the size.

        A layout may want a multiple, and a memory has as many rows as the next prime.
        """
        step = 1
        while step <= _LARGEST_STEP:
            there = self._size(self._start + step)
            if there is not None and there != self._here:
                return step, there - self._here
            step *= 2
        raise RecipeError(
            [f"{self._key}={self._start}: the size does not grow with it; name another key"]
        )

    def _size(self, value: int) -> float | None:
        """None: the value is not legal."""
        if value < 1:
            return None
        try:
            return self._measure(
                size_of(change(self._config, [f"{self._key}={value}"], [self._key]))
            )
        except RecipeError:
            return None


def deviation(size: float, reference: float) -> str:
    """Of a size from the reference, in per cent."""
    return f"{100 * (size / reference - 1):+.2f} %"


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of a global batch, where all steps have the same."""
    return config.train.global_batch_size * config.data.sequence_length
