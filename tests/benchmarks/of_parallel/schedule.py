"""The bubble of a pipeline's schedule: from its order, the times of its passes and of transfers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """One pass of a microbatch through a stage, or what a rank does in between."""

    kind: str
    """forward; backward, or inputs and weights where it is split. Two kinds wait for no other rank: sum,
    of a stage's gradients over microbatches and ranks, and handover, which lets tensors leave."""
    stage: int
    """Negative of a handover, and different for every rank."""
    microbatch: int
    """Any number of its own for what is no pass."""


def bubble(
    orders: Sequence[Sequence[Action]],
    seconds: Mapping[Action, float],
    stages: int,
    transfer: float = 0.0,
) -> float:
    """Part of the ranks' time in which they wait, when every action starts as soon as it can.

    Of equal stages in 1F1B with m microbatches it is `(ranks - 1) / (ranks - 1 + m)`.

    Args:
        orders: actions of each rank.
        seconds: that each takes.
        stages: of the whole pipeline.
        transfer: seconds that it takes to hand something to another rank.
    """
    home = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    done: dict[Action, float] = {}
    free = [0.0] * len(orders)
    left = [list(order) for order in orders]
    while any(left):
        moved = False
        for rank, order in enumerate(left):
            while order and all(one in done for one in needs(order[0], stages)):
                action = order.pop(0)
                there = (
                    done[one] + transfer * (home[one.stage] != rank)
                    for one in needs(action, stages)
                )
                start = max([free[rank], *there])
                end = start + seconds[action]
                free[rank] = done[_gradient_or_other(action)] = end
                moved = True
        assert moved, f"the schedule waits for itself: {[order[:1] for order in left]}"
    busy = sum(seconds[action] for order in orders for action in order)
    return 1.0 - busy / (len(orders) * max(free))


def needs(action: Action, stages: int) -> list[Action]:
    """What must be done before an action, beside all before it on its rank."""
    kind, stage, number = action
    if kind in ("sum", "handover"):
        return []
    if kind == "forward":
        return [Action(kind, stage - 1, number)] if stage else []
    if kind == "weights":
        return [Action("inputs", stage, number)]
    before = [Action("forward", stage, number)]
    return before if stage == stages - 1 else [*before, Action("inputs", stage + 1, number)]


def _gradient_or_other(action: Action) -> Action:
    """Whole and split backward passes both make the gradient of the inputs."""
    return action._replace(kind="inputs") if action.kind == "backward" else action
