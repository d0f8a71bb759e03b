"""The bubble of a pipeline's schedule: from its order and the times of its passes, without transfers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """One pass of a microbatch through a stage."""

    kind: str
    """forward; backward, or inputs and weights where it is split."""
    stage: int
    microbatch: int


def bubble(
    orders: Sequence[Sequence[Action]], seconds: Mapping[tuple[str, int], float], stages: int
) -> float:
    """Part of the ranks' time in which they wait, when every pass starts as soon as it can.

    Of equal stages in 1F1B with m microbatches it is `(ranks - 1) / (ranks - 1 + m)`.

    Args:
        orders: passes of each rank.
        seconds: of a pass, by kind and stage.
        stages: of the whole pipeline.
    """
    done: dict[Action, float] = {}
    free = [0.0] * len(orders)
    left = [list(order) for order in orders]
    while any(left):
        moved = False
        for rank, order in enumerate(left):
            while order and all(one in done for one in needs(order[0], stages)):
                action = order.pop(0)
                start = max([free[rank], *(done[one] for one in needs(action, stages))])
                end = start + seconds[action.kind, action.stage]
                free[rank] = done[_gradient_or_other(action)] = end
                moved = True
        assert moved, f"the schedule waits for itself: {[order[:1] for order in left]}"
    busy = sum(seconds[action.kind, action.stage] for order in orders for action in order)
    return 1.0 - busy / (len(orders) * max(free))


def needs(action: Action, stages: int) -> list[Action]:
    """What must be done before a pass."""
    kind, stage, number = action
    if kind == "forward":
        return [Action(kind, stage - 1, number)] if stage else []
    if kind == "weights":
        return [Action("inputs", stage, number)]
    before = [Action("forward", stage, number)]
    return before if stage == stages - 1 else [*before, Action("inputs", stage + 1, number)]


def _gradient_or_other(action: Action) -> Action:
    """Whole and split backward passes both make the gradient of the inputs."""
    return action._replace(kind="inputs") if action.kind == "backward" else action
