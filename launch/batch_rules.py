"""Rules about what is trained and evaluated on at a time; for `launch.validate`. No torch."""

import math
from collections.abc import Iterator
from typing import Any

from data.config import PAIR_TOKENS
from parallel.layout import ParallelLayout
from train.config import RunConfig
from train.stages import phases

Problems = Iterator[str]


class _DataRanks:
    """Ranks that see different sequences: their number and how a rule names it."""

    def __init__(self, config: RunConfig) -> None:
        layout = ParallelLayout.from_config(config.parallel)
        self.size = layout.data_parallel_size
        self.key = "parallel.data_parallel_size"
        if layout.data_replicate > 1:
            self.key += "*data_replicate"
        self.name = f"{self.key}={self.size}"


def batch(config: RunConfig) -> Problems:
    """Batches of the run and of its stages divide among the ranks that see different sequences."""
    train, data = config.train, _DataRanks(config)
    yield from _batch_of("train", train.global_batch_size, train.micro_batch_size, data)
    for index, stage in enumerate(train.stages):
        if stage.global_batch_size or stage.micro_batch_size:
            batch = stage.global_batch_size or train.global_batch_size
            micro = stage.micro_batch_size or train.micro_batch_size
            yield from _batch_of(f"train.stages[{index}]", batch, micro, data)


def _batch_of(place: str, batch: int, micro: int, data: _DataRanks) -> Problems:
    if batch % data.size:
        yield (
            f"{place}.global_batch_size={batch}: must be a multiple of {data.name}; use "
            f"{listed(multiples(batch, data.size))}"
        )
    elif batch % (micro * data.size):
        yield (
            f"{place}.micro_batch_size={micro}: times {data.name} must divide "
            f"{place}.global_batch_size={batch}; use {listed(divisors(batch // data.size))}, or "
            f"{place}.global_batch_size={listed(multiples(batch, micro * data.size))}"
        )


def ramp(config: RunConfig) -> Problems:
    """Every batch of the ramp divides among them, too."""
    ramp, first = config.train.batch_size_ramp, phases(config)[0]
    if ramp is None:
        return
    data = _DataRanks(config)
    unit = first.micro_batch_size * data.size
    for key, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % unit:
            yield (
                f"train.batch_size_ramp.{key}={value}: must be a multiple of micro batch size x "
                f"{data.key} = {unit}; use {listed(multiples(value, unit))}"
            )


def lanes(config: RunConfig) -> Problems:
    """Lanes divide every batch, and themselves among the ranks."""
    data = _DataRanks(config)
    lanes = config.data.num_lanes or config.train.global_batch_size
    batches = sorted({phase.global_batch_size for phase in phases(config)})
    if config.data.num_lanes is None and lanes % data.size:
        return  # the rule of the batch says so
    if lanes % data.size or any(batch % lanes for batch in batches):
        legal: list[Any] = [n for n in divisors(math.gcd(*batches)) if n % data.size == 0]
        if not any(batch % config.train.global_batch_size for batch in batches):
            legal.append("null")
        fix = listed(legal) if legal else f"batches that are multiples of {data.size}"
        shown = config.data.num_lanes or f"null (train.global_batch_size={lanes})"
        all_of_them = "the batch sizes " + ", ".join(map(str, batches))
        what = all_of_them if len(batches) > 1 else f"train.global_batch_size={batches[0]}"
        yield (
            f"data.num_lanes={shown}: must divide {what} and be a "
            f"multiple of {data.name}; use {fix}"
        )


def evaluation(config: RunConfig) -> Problems:
    """Held-out sequences divide among the ranks."""
    number, data = config.evaluate.num_sequences, _DataRanks(config)
    if config.evaluate.every_steps and number % data.size:
        yield (
            f"evaluate.num_sequences={number}: must be a multiple of {data.name}; use "
            f"{listed(multiples(number, data.size))}, or evaluate.every_steps=0 for none"
        )


def questions(config: RunConfig) -> Problems:
    """Answers are looked up in whole sequences and a whole vocabulary, by the rank that has the model."""
    path = f"evaluate.num_questions={config.evaluate.num_questions}"
    if not config.evaluate.num_questions:
        if config.train.answers_only:
            yield (
                f"{path}: train.answers_only=true leaves nothing to learn; use as many as the documents "
                "ask, such as evaluate.num_questions=4"
            )
        return
    for axis in ("tensor", "context", "pipeline"):
        if (size := getattr(config.parallel, f"{axis}_parallel_size")) > 1:
            yield (
                f"{path}: answers are scored where a rank has all of the model and its sequences, and "
                f"parallel.{axis}_parallel_size={size}; use 1, or evaluate.num_questions=0"
            )
    most = (config.data.sequence_length - 2) // PAIR_TOKENS
    if config.evaluate.num_questions > most:
        yield (
            f"{path}: a sequence of data.sequence_length={config.data.sequence_length} holds {most} at "
            f"most; use {most} or fewer"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def multiples(number: int, base: int) -> list[int]:
    """The multiples of `base` around `number`, positive ones."""
    below = number // base * base
    return [value for value in (below, below + base) if value > 0]


def listed(values: list[Any]) -> str:
    """Values for a sentence: "1, 2 or 4"; long lists lose their middle."""
    words = [str(value) for value in values]
    if len(words) > 8:
        words = [*words[:6], "...", words[-1]]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
