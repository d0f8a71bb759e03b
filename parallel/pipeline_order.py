"""In which order a pipeline rank runs the passes of its stages: pure arithmetic, no torch.

torch's schedules order themselves; this is what they do where it matters how often parameters are
gathered. With zero bubbles they stay gathered, and the order does not matter for that.
"""

from typing import Literal, NamedTuple

from parallel.config import ParallelConfig


class Pass(NamedTuple):
    """Of one microbatch through one stage."""

    kind: Literal["forward", "backward"]
    turn: int
    """Which of the rank's stages, in order."""


def passes(config: ParallelConfig, rank: int, microbatches: int) -> list[Pass]:
    """All passes of a pipeline rank in an optimizer step, in their order.

    Args:
        config: schedule and sizes; not a schedule that computes gradients of weights apart.
        rank: of the pipeline.
        microbatches: of the step.
    """
    ranks, turns = config.pipeline_parallel_size, config.pipeline_stages_per_rank
    if config.pipeline_schedule == "looped_bfs":
        forward = [Pass("forward", turn) for turn in range(turns) for _ in range(microbatches)]
        return forward + [Pass("backward", last.turn) for last in reversed(forward)]
    ahead, in_round = ranks - 1 - rank, microbatches
    if config.pipeline_schedule == "interleaved_1f1b":
        in_round = microbatches // max(1, microbatches // ranks)
        ahead = (turns - 1) * in_round + 2 * ahead
    forward = [Pass("forward", step // in_round % turns) for step in range(turns * microbatches)]
    backward = [Pass("backward", turns - 1 - one.turn) for one in forward]
    ahead = min(ahead, len(forward))
    pairs = zip(forward[ahead:], backward, strict=False)
    return [
        *forward[:ahead],
        *(one for pair in pairs for one in pair),
        *backward[len(forward) - ahead :],
    ]


def gathers(order: list[Pass], turn: int) -> int:
    """How often a stage's parameters are gathered that are freed after a forward pass.

    A backward pass leaves them gathered for what comes next, until the last one.
    """
    of_stage = ["forward", *(one.kind for one in order if one.turn == turn)]
    return of_stage[:-1].count("forward")
