"""Which document comes next into a sequence, and where it is cut. `data.lanes` asks here.

Pure functions of integers; images and clips (the spans of `data.content.Documents`) stay whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data.content import Content


@dataclass(slots=True)
class Held:
    """A document that a lane has drawn and not yet given in full."""

    source: int
    document: int
    start: int
    """Its next token."""
    length: int
    spans: Sequence[tuple[int, int]]
    content: Content | None = None
    """Once it was read."""

    def cut(self, room: int) -> int:
        """Where a piece from the next token ends that takes at most `room` tokens.

        Before the picture that does not fit; `start` itself if that is a picture.
        """
        stop = min(self.length, self.start + room)
        return next((first for first, last in self.spans if first < stop < last), stop)


class Packer(Protocol):
    """Chooses the next piece of a sequence."""

    def __call__(self, held: Sequence[Held], room: int, full: int) -> tuple[int, int] | None:
        """Index of the document and the end of its piece; None: what is left of the room stays empty.

        Args:
            held: what there is to choose from, in the order in which it was drawn; not empty.
            room: tokens that the sequence still takes, at least 1.
            full: tokens of a sequence.
        """


def concat_split(held: Sequence[Held], room: int, full: int) -> tuple[int, int] | None:
    """The first document, as far as it fits."""
    stop = held[0].cut(room)
    return (0, stop) if stop > held[0].start else None


def best_fit(held: Sequence[Held], room: int, full: int) -> tuple[int, int] | None:
    """The largest document that fits, the first drawn of equals; a new sequence takes the first drawn.

    So no document waits for more sequences than there are documents to choose from. One that is
    longer than a sequence counts as its pieces, each as long as a sequence allows.
    """
    if room == full:
        return concat_split(held, room, full)
    sizes = [one.cut(full) - one.start for one in held]
    fitting = [index for index, size in enumerate(sizes) if 0 < size <= room]
    if not fitting:
        return None
    largest = max(fitting, key=lambda index: (sizes[index], -index))
    return largest, held[largest].start + sizes[largest]


PACKERS: dict[str, Packer] = {"concat_split": concat_split, "best_fit": best_fit}
"""By the value of `data.packing`."""
