"""What a recipe must fulfil to be computed in a pipeline; no torch.

`launch.validate` reports the problems with all others, `train.build` refuses them on every rank.
"""

from collections.abc import Iterator

from parallel.layout import ParallelLayout, either
from parallel.pipeline_stages import (
    SPLIT_BACKWARD,
    microbatch_rule,
    nearest_microbatches,
    schedule_for,
    takes,
)
from parallel.pipeline_stages import problems as stage_problems
from train.config import RunConfig
from train.stages import Phase, phases


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the stages, or with the microbatches of any phase of the run.

    Sizes must be positive, and batches whole numbers of microbatches: other rules say so.
    """
    if config.parallel.pipeline_parallel_size == 1:
        return
    yield from stage_problems(config.parallel, config.model.num_layers)
    yield from _recompute(config)
    lines = (_microbatches(config, phase) for phase in phases(config))
    yield from dict.fromkeys(line for line in lines if line)


def _recompute(config: RunConfig) -> Iterator[str]:
    schedule, kind = config.parallel.pipeline_schedule, config.train.recompute
    if kind != "none" and schedule in SPLIT_BACKWARD:
        other = schedule_for(config.parallel.pipeline_stages_per_rank)
        yield (
            f"train.recompute={kind}: parallel.pipeline_schedule={schedule} goes back through a layer "
            "for its inputs and again for each of its weights, and would compute it anew each time; "
            f"use train.recompute=none, or parallel.pipeline_schedule={other}"
        )


def _microbatches(config: RunConfig, phase: Phase) -> str | None:
    data = ParallelLayout.from_config(config.parallel).data_parallel_size
    batch, micro = phase.global_batch_size, phase.micro_batch_size
    number, rest = divmod(batch, micro * data)
    if rest or takes(config.parallel, number):
        return None
    place, size = _place(config, phase, "micro_batch_size")
    micros = [n for n in range(1, batch // data + 1) if batch % (data * n) == 0]
    micros = [n for n in micros if takes(config.parallel, batch // (data * n))]
    batches = [micro * data * n for n in nearest_microbatches(config.parallel, number)]
    fixes = [f"{place}={either(micros)}"] if micros else []
    place, size = _place(config, phase, "global_batch_size")
    ramp = config.train.batch_size_ramp
    if ramp and batch < size:
        place, size = "train.batch_size_ramp.start", ramp.start
        fixes.append(f"a ramp over batches such as {either(batches)}")
    else:
        fixes.append(f"{place}={either(batches)}")
    return (
        f"{place}={size}: a batch of {batch} is {number} x {micro} sequences (microbatches x their size) "
        f"on each of parallel.data_parallel_size*data_replicate={data} ranks, and "
        f"{microbatch_rule(config.parallel, number)}; use {', or '.join(fixes)}"
    )


def _place(config: RunConfig, phase: Phase, key: str) -> tuple[str, int]:
    """Path and value of a batch size where the recipe says it for a phase."""
    stages = config.train.stages
    if stages and (own := getattr(stages[phase.stage], key)):
        return f"train.stages[{phase.stage}].{key}", own
    return f"train.{key}", getattr(config.train, key)
