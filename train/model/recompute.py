"""Which activations are computed again in the backward pass instead of being kept: `train.recompute`.

`full` keeps the streams that enter each block and repeats the block (`block`). `streams` is the rule
of mHC (arXiv 2512.24880, section 4.3.2): everything of a sub-layer is kept except the n-fold wide
streams around it, of which only every few blocks' first are.
"""

import math
from collections.abc import Callable
from itertools import accumulate

from jaxtyping import Float
from torch import Tensor

Write = Callable[[Tensor], Tensor]


class StreamSegment:
    """Streams of consecutive sites, of which the first is kept: `x_{l+1} = H_res x_l + H_post^T f_l`.

    f_l and the maps are kept for their own gradients anyway, so that is one pass over the streams a
    site, and no sub-layer and no map is computed again. In backward the last site comes first, and
    brings all streams of the segment back; the first site lets go of them.

    Args:
        first: the streams that enter the first site.
    """

    def __init__(self, first: Float[Tensor, "batch seq streams hidden"]) -> None:
        self._first: Tensor | None = first.detach().flatten(0, 1)
        self._writes: list[Write] = []
        self._streams: list[Tensor] = []

    def place(self) -> "StreamPlace":
        """Where the streams are that the next site reads."""
        return StreamPlace(self, len(self._writes))

    def record(self, write: Write) -> None:
        """Add a site's write: a function from the streams that it read to those that it left."""
        self._writes.append(write)

    def read(self, index: int) -> Float[Tensor, "tokens streams hidden"]:
        """The streams that site `index` of the segment read."""
        if self._first is None:
            raise RuntimeError("a second backward pass through recomputed streams")
        if not self._streams:
            steps = accumulate(self._writes[:-1], lambda x, write: write(x), initial=self._first)
            self._streams = list(steps)
        return self._streams[index]

    def release(self) -> None:
        """Free everything: the backward pass has left the segment."""
        self._first, self._writes, self._streams = None, [], []


class StreamPlace:
    """The streams that one site read."""

    def __init__(self, segment: StreamSegment, index: int) -> None:
        self.segment, self.index = segment, index

    def read(self) -> Float[Tensor, "tokens streams hidden"]:
        """The streams."""
        return self.segment.read(self.index)

    def leave(self) -> None:
        """The site's backward pass is done."""
        if self.index == 0:
            self.segment.release()


def segment_length(num_layers: int, num_streams: int) -> int:
    """Blocks of a segment that take the least memory: `sqrt(n L / (n + 2))`, rounded.

    n L / length first streams stay for the whole step, (n + 2) length come back at a time.
    """
    return max(1, round(math.sqrt(num_streams * num_layers / (num_streams + 2))))
