"""Which batches an optimizer step trains on: stages and the ramp of the batch size, laid out in steps.

A pure function of the recipe, so that a resumed run needs no state for it. `train.loop` opens a
loader per phase, `launch.validate` checks every phase before anything starts. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from train.config import BatchSizeRampConfig, RunConfig, StageConfig
from train.model.attention.config import IndexerStage


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Consecutive optimizer steps with batches of one shape."""

    stage: int
    """Index in `train.stages`; 0 without stages."""
    first_step: int
    last_step: int
    """Both belong to the phase; steps count from 1."""
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float | None
    """Constant; None: that of the schedule."""
    indexer_stage: IndexerStage | None
    """None: no stage of the run says one, and the model's stays."""

    @property
    def steps(self) -> range:
        """Its optimizer steps."""
        return range(self.first_step, self.last_step + 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_size * self.sequence_length


def phases(config: RunConfig) -> list[Phase]:
    """All phases of the run, in order; together they are the steps 1 to `train.steps`."""
    found: list[Phase] = []
    changes = any(stage.indexer_stage for stage in config.train.stages)
    for index, stage in enumerate(config.train.stages or (StageConfig(),)):
        before = found[-1].last_step if found else 0
        last = config.train.steps if stage.steps is None else before + stage.steps
        ramp = config.train.batch_size_ramp if index == 0 else None
        full = stage.global_batch_size or config.train.global_batch_size
        indexer = stage.indexer_stage or config.model.indexer.stage
        for size, steps in [*(ramp_steps(ramp, full) if ramp else ()), (full, last - before)]:
            first = found[-1].last_step + 1 if found else 1
            if first <= last:
                found.append(
                    Phase(
                        stage=index,
                        first_step=first,
                        last_step=min(last, first + steps - 1),
                        sequence_length=stage.sequence_length or config.data.sequence_length,
                        global_batch_size=size,
                        micro_batch_size=stage.micro_batch_size or config.train.micro_batch_size,
                        learning_rate=stage.learning_rate,
                        indexer_stage=indexer if changes else None,
                    )
                )
    return found


def ramp_steps(ramp: BatchSizeRampConfig, full: int) -> Iterator[tuple[int, int]]:
    """Batch sizes below `full`, and the optimizer steps with each.

    After c sequences the size is `start + floor(c k / samples) increment` where k increments lead
    from start to full: the rule of megatron-core, whose calculator divides in floating point
    and takes seconds to import, so that a recipe could not be checked with it.
    """
    increments = (full - ramp.start) // ramp.increment
    consumed = 0
    for number in range(increments):
        size = ramp.start + number * ramp.increment
        end = -(-(number + 1) * ramp.samples // increments)
        steps = max(0, -(-(end - consumed) // size))
        if steps:
            yield size, steps
        consumed += steps * size


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the stages and the ramp; the numbers must be positive already."""
    train, ramp = config.train, config.train.batch_size_ramp
    taken = 0
    for index, stage in enumerate(train.stages):
        if stage.steps is None and index < len(train.stages) - 1:
            yield (
                f"train.stages[{index}].steps=null: only the last stage may take what is left; use "
                "a number of steps"
            )
        taken += stage.steps or 0
        if stage.indexer_stage and not config.model.num_indexers:
            yield (
                f"train.stages[{index}].indexer_stage={stage.indexer_stage}: model.attention="
                f"{config.model.attention} has no indexer; use null, or model.attention=dsa"
            )
    if train.stages and train.stages[-1].steps is None and taken >= train.steps:
        yield (
            f"train.steps={train.steps}: train.stages take {taken} steps before the last one; use "
            f"train.steps={taken + 1} or more"
        )
    elif train.stages and train.stages[-1].steps is not None and taken != train.steps:
        yield (
            f"train.steps={train.steps}: train.stages take {taken} steps; use train.steps={taken}, "
            "or steps: null in the last stage"
        )
    if ramp:
        first = train.stages[0] if train.stages else StageConfig()
        yield from _ramp_problems(ramp, first, train.global_batch_size)


def _ramp_problems(ramp: BatchSizeRampConfig, stage: StageConfig, full: int) -> Iterator[str]:
    full = stage.global_batch_size or full
    if ramp.start > full or (full - ramp.start) % ramp.increment:
        yield (
            f"train.batch_size_ramp.start={ramp.start}: steps of increment={ramp.increment} must "
            f"lead to the full batch of {full}; use start={full % ramp.increment or ramp.increment}"
        )
        return
    needed = sum(steps for _, steps in ramp_steps(ramp, full))
    if stage.steps is not None and needed > stage.steps:
        yield (
            f"train.batch_size_ramp.samples={ramp.samples}: the ramp takes {needed} steps, the first "
            f"stage {stage.steps}; use fewer samples or train.stages[0].steps={needed}"
        )
