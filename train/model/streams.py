"""The residual streams between sub-layers: what enters, travels through and leaves the blocks.

`Streams` is the one thing that blocks hand on, whatever the kind of residual, and therefore also
what a pipeline stage sends to the next.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from train.model.config import ModelConfig
from train.model.recompute import StreamSegment


class Streams(NamedTuple):
    """State of every token between two sub-layers."""

    x: Float[Tensor, "batch seq streams hidden"]
    """The residual streams X_l; one stream for the plain residual."""
    read: Float[Tensor, "batch seq streams"] | None = None
    """Single-pass mHC: the coefficients A_{l-1} by which the next sub-layer reads `x`. They were
    computed from X_{l-1}. They are carried instead of the product A_{l-1} X_l, because Engram still
    adds to `x` before the read; n numbers a token beside n x hidden. None for all other kinds."""
    segment: StreamSegment | None = None
    """From which `x` is computed again in backward; None: it is kept. Stays on this rank."""

    @classmethod
    def of(cls, x: Tensor, read: Tensor | None = None) -> "Streams":
        """From `tensors`."""
        return cls(x, read)

    def tensors(self) -> list[Tensor]:
        """What there is of the state: what a pipeline stage sends to the next."""
        return [self.x] if self.read is None else [self.x, self.read]

    def moved_to(self, x: Float[Tensor, "batch seq streams hidden"]) -> "Streams":
        """Other streams than a site wrote, read as these would be; a segment starts anew there."""
        return Streams(x, self.read, None if self.segment is None else StreamSegment(x))

    def in_new_segment(self) -> "Streams":
        """The first streams of a segment; without gradients nothing is kept and none is made."""
        return self._replace(segment=StreamSegment(self.x) if torch.is_grad_enabled() else None)

    def without_segment(self) -> "Streams":
        """The same, kept by whoever reads them."""
        return self._replace(segment=None)


def num_streams(config: ModelConfig) -> int:
    """Parallel residual streams n; 1 for the plain residual."""
    return 1 if config.residual == "plain" else config.hyper_connection.num_streams


def expand_streams(hidden: Float[Tensor, "batch seq hidden"], config: ModelConfig) -> Streams:
    """Enter the network: every stream starts as a copy of the embedding.

    Single-pass mHC has no earlier site to take A_{-1} from: the first read is the mean.
    """
    n = num_streams(config)
    x = hidden.unsqueeze(2).expand(-1, -1, n, -1).contiguous()
    if config.residual != "mhc_single_pass":
        return Streams(x)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return Streams(x, torch.full(x.shape[:3], 1 / n, dtype=wide, device=x.device))
