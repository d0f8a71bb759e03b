"""Positions in the data as a checkpoint keeps them: one item for each lane, and one for what all share.

`order` says what the order of documents is a function of. A run that goes on must have the same, for
its lanes' positions mean nothing in another; `sequence_length` is not among it, for stages of a
run may change it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data.lanes import Lane, Progress, Stream

ORDER = "order"
"""Key of the common item."""
_VERSION = 2
_SCHEDULE = "data.weight_schedule"
_SOURCE_KEYS = ("weight", "epochs", "max_documents", "held_out")
_DATA_KEYS = ("packing", "lookahead", "block_documents", "window_blocks")


def lane_name(index: int) -> str:
    """Key of a lane."""
    return f"lane/{index:06d}"


def lane_range(num_lanes: int, data_rank: int, data_size: int) -> range:
    """Lanes of a data rank: neighbours, so that concatenating the ranks' sequences keeps lane order."""
    share = num_lanes // data_size
    return range(data_rank * share, (data_rank + 1) * share)


def owned_items(num_lanes: int, data_rank: int, data_size: int) -> list[str]:
    """Keys of the state that `build_loader` yields on a data rank."""
    return [ORDER, *map(lane_name, lane_range(num_lanes, data_rank, data_size))]


def save_lanes(stream: Stream, lanes: Sequence[Lane]) -> dict[str, str]:
    """The state of some lanes of a stream after a batch, JSON by key."""
    [progress] = {lane.progress for lane in lanes}
    common = {"version": _VERSION, "progress": progress, "order": _order(stream)}
    return {ORDER: json.dumps(common)} | {lane_name(lane.index): lane.state() for lane in lanes}


def open_lanes(
    stream: Stream, indices: Iterable[int], state: Mapping[str, str] | None
) -> list[Lane]:
    """Lanes at their beginning, or where `state` left them.

    Raises:
        ValueError: the state belongs to another order, or lacks a lane.
    """
    if state is None:
        return [Lane(stream, index) for index in indices]
    names = {index: lane_name(index) for index in indices}
    missing = [key for key in (ORDER, *names.values()) if key not in state]
    if missing:
        raise ValueError(
            f"{missing[0]}: the saved data position has {len(state)} items and not this one; keep "
            "data.num_lanes (null: train.global_batch_size) as it was"
        )
    common = json.loads(state[ORDER])
    if common.get("version") != _VERSION:
        raise ValueError(
            f"the saved data position has version {common.get('version')}, and this is {_VERSION}; "
            "go on with the version that saved it, or start a new run"
        )
    progress = Progress(*common["progress"])
    _check_order(common["order"], json.loads(json.dumps(_order(stream))), progress.tokens)
    return [Lane(stream, index, state[name], progress) for index, name in names.items()]


def _order(stream: Stream) -> dict[str, Any]:
    """What the order is a function of, by the keys of a recipe as far as there is one."""
    config = stream.config
    return {
        "train.seed": stream.seed,
        "data.num_lanes": stream.num_lanes,
        **{
            f"data.sources.{name}.{key}": getattr(source, key)
            for name, source in zip(stream.names, stream.sources, strict=True)
            for key in _SOURCE_KEYS
        },
        **{f"data.{key}": getattr(config, key) for key in _DATA_KEYS},
        **stream.lengths,
        _SCHEDULE: [asdict(change) for change in config.weight_schedule],
    }


def _check_order(saved: dict[str, Any], now: dict[str, Any], tokens: int) -> None:
    keys = sorted((saved.keys() | now.keys()) - {_SCHEDULE})
    absent = "nothing"
    changed = [
        f"{key}={json.dumps(now[key]) if key in now else absent}: the saved data position has "
        f"{json.dumps(saved[key]) if key in saved else absent}"
        for key in keys
        if saved.get(key, absent) != now.get(key, absent)
    ]
    if changed:
        raise ValueError(
            "\n".join(changed) + "\nThe position belongs to another order of the data; keep the "
            "values as they were, or start a new run (weights may change by data.weight_schedule, "
            f"from tokens={tokens} on)"
        )
    _check_schedule(saved[_SCHEDULE], now[_SCHEDULE], tokens)


def _check_schedule(saved: list[Any], now: list[Any], tokens: int) -> None:
    """Changes that are still to come may be others than when the position was saved."""
    past, wanted = (
        [change for change in schedule if change["tokens"] < tokens] for schedule in (saved, now)
    )
    if past != wanted:
        raise ValueError(
            f"data.weight_schedule={json.dumps(now)}: {tokens} tokens were trained on with "
            f"{json.dumps(saved)}; keep its changes below {tokens} as they were, and add others "
            f"from tokens={tokens} on"
        )
