"""Virtual lanes: the training stream cut into V independent streams, V fixed for the life of a run.

`data.loader` gives every data rank V / data_size neighbouring lanes; a global batch is the lanes' next
sequences in lane order. A lane knows nothing of ranks, so the global batches are the same for
every data_size that divides V, and a run may stop on 8 ranks and go on with 2. A lane's state is a
few integers; what all lanes agree on is kept once (`data.resume`).
"""

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from data.config import DataConfig, SourceConfig
from data.content import Content, Documents, Piece
from data.faults import DamagedSampleError, Fault
from data.order import credit_after, draw_source, permute_blocks
from data.packers import PACKERS, Held


class NoDocumentsLeftError(ValueError):
    """A lane has drawn every document as often as `epochs` allows."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What all lanes of a run agree on. The order is a pure function of this and of the lane."""

    config: DataConfig
    documents: Mapping[str, Documents]
    """By name of the source."""
    split: str
    seed: int
    num_lanes: int
    lengths: Mapping[str, object] = field(default_factory=dict)
    """What the documents' lengths depend on beside the corpus, such as the sizes of images: plain
    values, by the key of the recipe that says them."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sources, sorted, so that their order in a recipe does not matter."""
        return tuple(sorted(self.documents))

    @cached_property
    def sources(self) -> tuple[SourceConfig, ...]:
        """In the order of `names`."""
        return tuple(self.config.sources[name] for name in self.names)

    @cached_property
    def eras(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """From how many tokens of the run on which weights hold, in the order of `names`.

        Evaluation has those of the start.
        """
        weights = {name: source.weight for name, source in self.config.sources.items()}
        eras = [(0, tuple(weights[name] for name in self.names))]
        for change in self.config.weight_schedule if self.split == "train" else ():
            weights |= change.weights
            eras.append((change.tokens, tuple(weights[name] for name in self.names)))
        return tuple(eras)

    def draws(self, source: int, lane: int) -> int | None:
        """How often a lane draws from a source in all; None: without end, as in evaluation."""
        epochs = self.sources[source].epochs
        if epochs is None or self.split != "train":
            return None
        total = len(self.documents[self.names[source]]) * epochs
        return max(0, -(-(total - lane) // self.num_lanes))

    def document(self, source: int, draw: int) -> int:
        """The document of a draw, counted over all lanes."""
        name = self.names[source]
        epoch, position = divmod(draw, size := len(self.documents[name]))
        return permute_blocks(
            position,
            size,
            seed=self.seed,
            stream=f"{self.split}/{name}",
            epoch=epoch,
            block=self.config.block_documents,
            window=self.config.window_blocks,
        )


class Progress(NamedTuple):
    """Where all lanes stand, for they advance together."""

    tokens: int
    """Of the whole run, before the next sequence."""
    era: int
    """Whose weights held in the last sequence."""


class Lane:
    """One of the V streams: draws documents, cuts them into sequences, carries the rest over.

    Draw k of a source in lane v is draw g = k * V + v of that source: document permutation(g mod n)
    of epoch g div n, so the lanes share each epoch without overlap. With `epochs`, a lane whose
    share of a source is used up goes on with the other sources.
    """

    def __init__(
        self, stream: Stream, index: int, state: str | None = None, at: Progress | None = None
    ) -> None:
        """Start lane `index` of `stream`, or continue after `state` from where the run stood."""
        self.index = index
        self._stream = stream
        self._pack = PACKERS[stream.config.packing]
        self._depth = 1 if stream.config.packing == "concat_split" else stream.config.lookahead
        self._faults: list[Fault] = []
        self._progress = at or Progress(0, 0)
        self._skipped = 0
        self._cursors = [0] * len(stream.names)
        self._credit: list[int] = []
        self._held: list[Held] = []
        if state is None:
            self._start_mixture()
        else:
            self._skipped, self._credit, self._cursors, held = json.loads(state)
            self._weights = self._weights_left()
            self._held = [self._hold(*one) for one in held]

    @property
    def progress(self) -> Progress:
        """The same for all lanes after a batch."""
        return self._progress

    def next_sequence(self) -> list[Piece]:
        """Pieces whose lengths sum to sequence_length, or less where no document fits what is left.

        Raises:
            NoDocumentsLeftError: all documents were drawn as often as `epochs` allows.
            DamagedSampleError: a document is damaged and must not be skipped.
            ValueError: an image or clip is longer than a sequence.
        """
        self._enter_era()
        full = room = self._stream.config.sequence_length
        pieces: list[Piece] = []
        while room and self._fill() and (chosen := self._pack(self._held, room, full)):
            number, stop = chosen
            held = self._held[number]
            content = self._read(held)
            if content is None:
                del self._held[number]
                continue
            pieces.append(Piece(content, held.start, stop, held.source, held.document))
            room -= stop - held.start
            held.start = stop
            if stop == held.length:
                del self._held[number]
        if not pieces:
            self._refuse_empty(full)
        tokens = self._progress.tokens + full * self._stream.num_lanes
        self._progress = Progress(tokens, self._progress.era)
        return pieces

    def state(self) -> str:
        """JSON from which another process continues after the last sequence.

        A list: documents skipped, credit and cursor of every source, and [source, document, next
        token] of what was drawn and not given in full.
        """
        held = [(one.source, one.document, one.start) for one in self._held]
        state = (self._skipped, self._credit, self._cursors, held)
        return json.dumps(state, separators=(",", ":"))

    def take_faults(self) -> list[Fault]:
        """What was skipped since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def _enter_era(self) -> None:
        eras, (tokens, era) = self._stream.eras, self._progress
        now = bisect_right(eras, tokens, key=lambda one: one[0]) - 1
        if now != era:
            self._progress = Progress(tokens, now)
            self._start_mixture()

    def _start_mixture(self) -> None:
        """Begin to draw in the ratio of the weights that hold, of the sources that are left."""
        self._weights = self._weights_left()
        if any(self._weights):
            # Lanes start at different points of the mixture, or all would begin with one source.
            self._credit = credit_after(self._weights, self.index)
        else:
            self._credit = [0] * len(self._weights)

    def _weights_left(self) -> list[int]:
        weights = list(self._stream.eras[self._progress.era][1])
        for source in range(len(weights)):
            if self._used_up(source):
                weights[source] = 0
        return weights

    def _used_up(self, source: int) -> bool:
        draws = self._stream.draws(source, self.index)
        return draws is not None and self._cursors[source] >= draws

    def _fill(self) -> bool:
        """Draw until there is enough to choose from; whether there is anything at all."""
        while len(self._held) < self._depth and any(self._weights):
            source = draw_source(self._weights, self._credit)
            draw = self._cursors[source] * self._stream.num_lanes + self.index
            self._cursors[source] += 1
            if self._used_up(source):
                self._start_mixture()
            self._held.append(self._hold(source, self._stream.document(source, draw), 0))
        return bool(self._held)

    def _hold(self, source: int, document: int, start: int) -> Held:
        documents = self._stream.documents[self._stream.names[source]]
        length, spans = documents.num_tokens(document), documents.spans(document)
        return Held(source, document, start, length, spans)

    def _read(self, held: Held) -> Content | None:
        """The document, which is read once; None if it is damaged and left out.

        The draw stays used, and the lane's next draw takes its place: no other lane notices.
        """
        if held.content is None:
            try:
                name = self._stream.names[held.source]
                held.content = self._stream.documents[name].read(held.document)
            except DamagedSampleError as error:
                self._skip(error)
        return held.content

    def _skip(self, error: DamagedSampleError) -> None:
        config, draws = self._stream.config.faults, sum(self._cursors)
        if config.damaged == "raise":
            raise error
        self._skipped += 1
        if self._skipped > 1 + config.max_skipped_fraction * draws:
            raise DamagedSampleError(
                error.fault,
                f"lane {self.index} has now left out {self._skipped} of {draws} documents, more "
                f"than data.faults.max_skipped_fraction={config.max_skipped_fraction} allows; "
                "repair the corpus (`mneme data verify` lists all that is damaged), or allow more",
            ) from error
        self._faults.append(error.fault)

    def _refuse_empty(self, full: int) -> None:
        if self._held:
            held = self._held[0]
            name = self._stream.names[held.source]
            raise ValueError(
                f"data.sequence_length={full}: document {held.document} of source {name} has an "
                "image or clip of more tokens; use longer sequences, or smaller data.image.max_rows "
                "or max_frames"
            )
        limits = ", ".join(
            f"data.sources.{name}.epochs={source.epochs}"
            for name, source in zip(self._stream.names, self._stream.sources, strict=True)
            if source.epochs is not None
        )
        raise NoDocumentsLeftError(
            f"{limits}: lane {self.index} has no document left, of the sources with weight, after "
            f"{self._progress.tokens} tokens of the run; use more epochs (null: no end), more documents, or end the run before with "
            "train.steps"
        )
