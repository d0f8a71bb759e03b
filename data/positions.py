"""Rotary positions (t, h, w) of a document with images; for whoever fills `VisionInput`.

The scheme of Qwen2-VL (arXiv 2409.12191, section 2.1): text moves on all three axes at once, an
image spreads over them from where it stands, and the text after it goes on beyond its largest
position. So text alone has its ordinary positions, and a long video takes few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Span:
    """The placeholders of one image or clip, which stand together."""

    start: int
    """Place of the first in the document, or in the piece of it that is packed."""
    grid: tuple[int, int, int]
    """Rows in t, h and w: those of the patches, h and w divided by the spatial merge."""


def rope_positions(length: int, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Positions [length, 3] of the tokens of a document.

    Args:
        length: tokens, placeholders included.
        spans: images in order of their start; they do not overlap.

    Raises:
        ValueError: a span begins within another one or ends behind the document.
    """
    positions = np.empty((length, 3), np.int64)
    place = position = 0
    for span in spans:
        stop = span.start + int(np.prod(span.grid))
        if span.start < place or stop > length:
            raise ValueError(
                f"{span}: must begin at {place} or later and end by {length}, but ends at {stop}; "
                "keep spans in order, and an image within one piece of its document"
            )
        position = _text(positions[place : span.start], position)
        grid = np.indices(span.grid).reshape(3, -1).T
        positions[span.start : stop] = position + grid
        place, position = stop, position + max(span.grid)
    _text(positions[place:], position)
    return positions


def _text(part: NDArray[np.int64], position: int) -> int:
    """Number the tokens from `position`, the same on every axis; returns the position after them."""
    part[:] = np.arange(position, position + len(part))[:, None]
    return position + len(part)
