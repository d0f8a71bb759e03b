"""Virtual lanes: the training stream cut into V independent streams, V fixed for the life of a run.

`data.loader` gives every data rank V / data_size neighbouring lanes; a global batch is the lanes' next
sequences in lane order. A lane knows nothing of ranks, so the global batches are the same for
every data_size that divides V, and a run may stop on 8 ranks and go on with 2. A lane's state is a
few integers. Imports neither torch nor numpy, so that recipes are checked without them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from data.order import credit_after, draw_source, permute, round_keys

_STATE_VERSION = 1
_DATA_SIZE = "parallel.data_parallel_size*data_replicate"
"""How rules name the number of ranks that see different sequences."""


@runtime_checkable
class Documents(Protocol):
    """A source as a lane sees it."""

    def __len__(self) -> int:
        """Number of documents."""

    def num_tokens(self, document: int) -> int:
        """Length of a document in tokens, at least 1."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What all lanes of a run agree on. The order is a pure function of this and of the lane."""

    names: tuple[str, ...]
    """Sources, sorted."""
    weights: tuple[int, ...]
    documents: tuple[Documents, ...]
    split: str
    seed: int
    num_lanes: int
    sequence_length: int


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start..stop (exclusive) of a document; its place in a sequence follows from the order."""

    source: int
    document: int
    start: int
    stop: int


class Lane:
    """One of the V streams: draws documents, cuts them into sequences, carries the rest over.

    Draw k of a source in lane v is draw g = k * V + v of that source: document permutation(g mod n)
    of epoch g div n, so the lanes share each epoch without overlap. Documents are
    concatenated and cut at the sequence's end: no token is dropped and none is padding.
    """

    def __init__(self, stream: Stream, index: int, state: str | None = None) -> None:
        """Start lane `index` of `stream`, or continue after `state`.

        Raises:
            ValueError: the state belongs to another order.
        """
        self.index = index
        self._stream = stream
        self._carry: tuple[int, int] | None = None
        """Source and next token of the document that the last sequence cut."""
        if state is None:
            # Lanes start at different points of the mixture, or all would begin with one source.
            self._credit = credit_after(stream.weights, index)
            self._cursors = [0] * len(stream.weights)
        else:
            self._restore(json.loads(state))

    def next_sequence(self) -> list[Span]:
        """Spans whose lengths sum to sequence_length."""
        spans: list[Span] = []
        room = self._stream.sequence_length
        while room:
            source, start = self._carry or self._draw()
            document = self._last_document(source)
            length = self._stream.documents[source].num_tokens(document)
            stop = min(length, start + room)
            spans.append(Span(source, document, start, stop))
            room -= stop - start
            self._carry = None if stop == length else (source, stop)
        return spans

    def state(self) -> str:
        """JSON from which another process continues after the last sequence."""
        return json.dumps(
            {
                "version": _STATE_VERSION,
                "order": self._order(),
                "credit": self._credit,
                "cursors": self._cursors,
                "carry": self._carry,
            },
            separators=(",", ":"),
        )

    def _draw(self) -> tuple[int, int]:
        source = draw_source(self._stream.weights, self._credit)
        self._cursors[source] += 1
        return source, 0

    def _last_document(self, source: int) -> int:
        stream = self._stream
        size = len(stream.documents[source])
        draw = (self._cursors[source] - 1) * stream.num_lanes + self.index
        epoch, position = divmod(draw, size)
        keys = round_keys(stream.seed, f"{stream.split}/{stream.names[source]}", epoch)
        return permute(position, size, keys)

    def _order(self) -> dict[str, object]:
        stream = self._stream
        return {
            "seed": stream.seed,
            "lanes": stream.num_lanes,
            "weights": dict(zip(stream.names, stream.weights, strict=True)),
        }

    def _restore(self, state: dict[str, object]) -> None:
        saved, order = state.get("order"), self._order()
        if state.get("version") != _STATE_VERSION or saved != order:
            raise ValueError(
                f"{lane_name(self.index)}: the saved position belongs to another order of the "
                f"data, {json.dumps(saved)}, and this run has {json.dumps(order)}; keep "
                "train.seed, data.num_lanes (null: train.global_batch_size) and the names and "
                "weights of data.sources as they were, or start a new run"
            )
        credit, cursors, carry = state["credit"], state["cursors"], state["carry"]
        assert isinstance(credit, list), credit
        assert isinstance(cursors, list), cursors
        self._credit, self._cursors = credit, cursors
        if carry is not None:
            assert isinstance(carry, list), carry
            self._carry = (carry[0], carry[1])


def lane_name(index: int) -> str:
    """Key of a lane in checkpoints."""
    return f"lane/{index:06d}"


def lane_range(num_lanes: int, data_rank: int, data_size: int) -> range:
    """Lanes of a data rank: neighbours, so that concatenating the ranks' sequences keeps lane order."""
    share = num_lanes // data_size
    return range(data_rank * share, (data_rank + 1) * share)


def owned_lanes(num_lanes: int, data_rank: int, data_size: int) -> list[str]:
    """Names of the lanes of a data rank, the keys of the state that `build_loader` yields there."""
    return [lane_name(index) for index in lane_range(num_lanes, data_rank, data_size)]


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
