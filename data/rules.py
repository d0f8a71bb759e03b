"""Rules about `data.*` that need no file, each `path=value: rule; what to type instead`.

`launch.validate` reports them before anything starts, `data.loader` refuses what breaks them. Imports
neither torch nor numpy.
"""

from collections.abc import Iterator, Sequence

from data.config import DataConfig

_DATA_SIZE = "parallel.data_parallel_size*data_replicate"
"""How rules name the number of ranks that see different sequences."""


def problems(config: DataConfig) -> Iterator[str]:
    """What is wrong with the values together; numbers are in their ranges already."""
    for name, source in config.sources.items():
        if source.held_out is not None and source.held_out >= 1:
            yield (
                f"data.sources.{name}.held_out={source.held_out}: is a share of the documents and "
                "must be below 1; for example 0.01"
            )
    defaults = DataConfig()
    if config.packing == "concat_split" and config.lookahead != defaults.lookahead:
        yield (
            f"data.lookahead={config.lookahead}: data.packing=concat_split takes documents as they "
            "come; leave it out, or use data.packing=best_fit"
        )
    if config.packing == "best_fit" and config.lookahead < 2:
        yield (
            f"data.lookahead={config.lookahead}: data.packing=best_fit needs documents to choose "
            "from; use 2 or more, or data.packing=concat_split"
        )
    if config.block_documents == 1 and config.window_blocks != defaults.window_blocks:
        yield (
            f"data.window_blocks={config.window_blocks}: data.block_documents=1 has no blocks; leave "
            "it out, or use for example data.block_documents=256"
        )
    yield from _weights(config)


def _weights(config: DataConfig) -> Iterator[str]:
    weights = {name: source.weight for name, source in config.sources.items()}
    for name, weight in weights.items():
        if weight < 0:
            yield f"data.sources.{name}.weight={weight}: must not be negative; use 0 or more"
    if weights and not any(weights.values()):
        yield (
            f"data.sources.{next(iter(weights))}.weight=0: no source has weight at the start; use 1 "
            "or more for one of them"
        )
    before = 0
    for index, change in enumerate(config.weight_schedule):
        path = f"data.weight_schedule[{index}]"
        unknown = sorted(change.weights.keys() - weights.keys())
        if unknown:
            known = ", ".join(sorted(weights))
            yield f"{path}.weights.{unknown[0]}: there is no such source; use one of {known}"
        if not change.weights:
            yield f"{path}.weights={{}}: changes nothing; name a source, or leave the entry out"
        if change.tokens <= before:
            yield (
                f"{path}.tokens={change.tokens}: changes come in the order of their tokens; use more "
                f"than {before}"
            )
        before = max(before, change.tokens)
        weights |= change.weights
        if weights and not any(weights.values()):
            yield f"{path}.weights: leaves no source with weight; use 1 or more for one of them"


def check_lanes(global_batch_size: int, data_size: int, num_lanes: int | None) -> list[str]:
    """Broken rules about lanes, each with values that work; empty if all is well.

    Args:
        global_batch_size: sequences in an optimizer step, over all ranks.
        data_size: ranks that see different sequences.
        num_lanes: V; None takes the global batch size.
    """
    if min(global_batch_size, data_size, 1 if num_lanes is None else num_lanes) < 1:
        return [
            f"train.global_batch_size={global_batch_size}, {_DATA_SIZE}={data_size}, "
            f"data.num_lanes={num_lanes}: must be at least 1; use 1 or more"
        ]
    if num_lanes is None:
        if global_batch_size % data_size == 0:
            return []
        below = global_batch_size // data_size * data_size
        return [
            f"train.global_batch_size={global_batch_size}: must be a multiple of "
            f"{_DATA_SIZE}={data_size}; use {_either(below, below + data_size)}"
        ]
    problems = []
    if global_batch_size % num_lanes:
        fits = [v for v in _divisors(global_batch_size) if v % data_size == 0]
        problems.append(
            f"data.num_lanes={num_lanes}: must divide train.global_batch_size="
            f"{global_batch_size}; use {_nearest(fits, num_lanes)}"
        )
    if num_lanes % data_size:
        problems.append(
            f"{_DATA_SIZE}={data_size}: must divide data.num_lanes={num_lanes}; use "
            f"{_nearest(_divisors(num_lanes), data_size)}"
        )
    return problems


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(values: Sequence[int], wanted: int) -> str:
    below = max((value for value in values if value < wanted), default=0)
    above = min((value for value in values if value > wanted), default=0)
    return _either(below, above) if below or above else "null, and another global batch size"


def _either(below: int, above: int) -> str:
    return " or ".join(str(value) for value in (below, above) if value)
