"""What a reader gives for a document, and what packing takes: token ids and the images among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Picture:
    """One image or clip of a document, decoded."""

    start: int
    """Its first placeholder in the document."""
    grid: tuple[int, int, int]
    """Patches in t, h and w, as in `data.vision`."""
    rows: tuple[int, int, int]
    """Placeholders in t, h and w: the grid, h and w divided by the spatial merge."""
    patches: NDArray[np.uint8]
    """[t h w of the grid, values of a patch], in the order of `data.vision`."""

    @property
    def stop(self) -> int:
        """After its last placeholder."""
        t, h, w = self.rows
        return self.start + t * h * w


@dataclass(frozen=True, slots=True)
class Content:
    """A document in full."""

    tokens: NDArray[np.unsignedinteger]
    """[num_tokens]: a placeholder for each row of an image, the end-of-document id last."""
    pictures: tuple[Picture, ...] = ()
    """In order; they do not overlap."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start..stop (exclusive) of a document. Pictures lie inside it or outside, never across."""

    content: Content
    start: int
    stop: int
    source: int
    """Index into the names of the stream."""
    document: int
    """Number of the document in its source."""


@runtime_checkable
class Documents(Protocol):
    """A source as a lane sees it. Lengths and spans come from an index, without reading."""

    def __len__(self) -> int:
        """Number of documents."""

    def num_tokens(self, document: int) -> int:
        """Length of a document in tokens, placeholders included; at least 1."""

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        """Start and stop of what must not be cut (images and clips), in order; empty for text."""

    def read(self, document: int) -> Content:
        """The document.

        Raises:
            DamagedSampleError: it is not what was written, or cannot be decoded.
        """
