"""Which layers a pipeline stage has, and which rank computes it: pure arithmetic, no torch.

`train.build` builds the stages of its rank by it, `parallel.pipeline` runs them, and
`train.pipeline_rules` checks recipes.

    loop    stage s is on rank s mod ranks
    V       with two stages on a rank, rank r has stages r and 2 ranks - 1 - r (zbv, dualpipev)
"""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.config import ParallelConfig, PipelineSchedule

V_SHAPED: tuple[PipelineSchedule, ...] = ("zbv", "dualpipev")
SPLIT_BACKWARD: tuple[PipelineSchedule, ...] = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute gradients of weights apart from those of inputs."""
_IN_ROUNDS: tuple[PipelineSchedule, ...] = ("interleaved_1f1b", "interleaved_zero_bubble")


@dataclass(frozen=True, kw_only=True)
class PipelineStages:
    """The layers of every stage, and the places of the stages."""

    num_ranks: int
    v_shaped: bool
    layers: tuple[range, ...]
    """Of each stage, in the order of the network."""

    @classmethod
    def from_config(cls, config: ParallelConfig, num_layers: int) -> "PipelineStages":
        """The stages that a recipe asks for; `problems` found none."""
        if config.pipeline_parallel_size == 1:
            return cls(num_ranks=1, v_shaped=False, layers=(range(num_layers),))
        counts = config.pipeline_layers or even_layers(num_layers, num_stages(config))
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return cls(
            num_ranks=config.pipeline_parallel_size,
            v_shaped=config.pipeline_schedule in V_SHAPED,
            layers=tuple(range(end - n, end) for end, n in zip(ends, counts, strict=True)),
        )

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that computes a stage."""
        turn, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.v_shaped and turn % 2 else place

    def of_rank(self, rank: int) -> list[int]:
        """Stages that a pipeline rank computes, in order."""
        return [stage for stage in range(len(self.layers)) if self.rank_of(stage) == rank]


def num_stages(config: ParallelConfig) -> int:
    """Stages of the pipeline; 1 without one."""
    if config.pipeline_parallel_size == 1:
        return 1
    return config.pipeline_parallel_size * config.pipeline_stages_per_rank


def even_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, in order: equal, or one more in the first stages."""
    each, more = divmod(num_layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def problems(config: ParallelConfig, num_layers: int) -> Iterator[str]:
    """What is wrong with the stages of a pipeline of several ranks, and what to type instead."""
    yield from _stages_per_rank(config)
    yield from _layers(config, num_layers)
    if config.pipeline_schedule in SPLIT_BACKWARD and config.reshard_after_forward:
        yield (
            f"parallel.reshard_after_forward=true: parallel.pipeline_schedule="
            f"{config.pipeline_schedule} needs the gathered parameters from the forward pass to the "
            "gradients of the weights; use parallel.reshard_after_forward=false, or "
            f"parallel.pipeline_schedule={schedule_for(config.pipeline_stages_per_rank)}"
        )


def _stages_per_rank(config: ParallelConfig) -> Iterator[str]:
    schedule, per_rank = config.pipeline_schedule, config.pipeline_stages_per_rank
    here = f"parallel.pipeline_stages_per_rank={per_rank}: parallel.pipeline_schedule={schedule}"
    if schedule == "1f1b" and per_rank != 1:
        yield f"{here} has one on a rank; use 1, or parallel.pipeline_schedule=interleaved_1f1b"
    if schedule in V_SHAPED and per_rank != 2:
        other = schedule_for(per_rank)
        yield f"{here} has two on a rank; use 2, or parallel.pipeline_schedule={other}"


def schedule_for(stages_per_rank: int) -> PipelineSchedule:
    """A schedule without further conditions for so many stages on a rank."""
    return "1f1b" if stages_per_rank == 1 else "interleaved_1f1b"


def _layers(config: ParallelConfig, num_layers: int) -> Iterator[str]:
    ranks, per_rank, given = (
        config.pipeline_parallel_size,
        config.pipeline_stages_per_rank,
        config.pipeline_layers,
    )
    stages = num_stages(config)
    if stages > num_layers:
        fits = f"use {num_layers // per_rank} or fewer" if num_layers >= per_rank else "use 1"
        yield (
            f"parallel.pipeline_parallel_size={ranks}: times parallel.pipeline_stages_per_rank="
            f"{per_rank} makes {stages} stages of model.num_layers={num_layers}, and each needs a "
            f"layer; {fits}"
        )
    elif given and (len(given) != stages or min(given) < 1 or sum(given) != num_layers):
        yield (
            f"parallel.pipeline_layers={_brackets(given)}: must be {stages} numbers "
            f"(parallel.pipeline_parallel_size={ranks} x parallel.pipeline_stages_per_rank="
            f"{per_rank}), each at least 1, that add up to model.num_layers={num_layers}; use "
            f"{_brackets(even_layers(num_layers, stages))}, or null"
        )


def takes(config: ParallelConfig, microbatches: int) -> bool:
    """Whether the schedule can order so many microbatches."""
    ranks = config.pipeline_parallel_size
    if config.pipeline_schedule in _IN_ROUNDS:
        return microbatches % max(1, microbatches // ranks) == 0
    return microbatches >= fewest_microbatches(config)


def fewest_microbatches(config: ParallelConfig) -> int:
    """The fewest microbatches of an optimizer step."""
    one_a_stage = config.pipeline_schedule in ("1f1b", "dualpipev")
    return num_stages(config) if one_a_stage else 1


def microbatch_rule(config: ParallelConfig, microbatches: int) -> str:
    """What is wrong with a number of microbatches that the schedule does not take."""
    schedule, ranks = config.pipeline_schedule, config.pipeline_parallel_size
    if schedule in _IN_ROUNDS:
        return (
            f"parallel.pipeline_schedule={schedule} orders them in {microbatches // ranks} equal rounds "
            f"of parallel.pipeline_parallel_size={ranks} or more"
        )
    return (
        f"parallel.pipeline_schedule={schedule} needs one for each of {num_stages(config)} stages"
    )


def nearest_microbatches(config: ParallelConfig, microbatches: int) -> list[int]:
    """The numbers around `microbatches` that the schedule takes: below, if there is one, and above."""
    below = next((n for n in range(microbatches, 0, -1) if takes(config, n)), None)
    above = max(microbatches, fewest_microbatches(config))
    while not takes(config, above):
        above += 1
    return [n for n in (below, above) if n is not None]


def _brackets(values: tuple[int, ...]) -> str:
    """Numbers as they are typed in an override."""
    return f"[{','.join(map(str, values))}]"
