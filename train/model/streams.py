"""The residual streams between sub-layers: what enters, travels through and leaves the blocks.

`Streams` is the one thing that blocks hand on, whatever the kind of residual, and therefore also
what a pipeline stage sends to the next: see `Handover`.
"""

from collections.abc import Sequence
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


class Handover(NamedTuple):
    """What a pipeline stage hands to the next, for the rank's part of the tokens."""

    streams: Streams
    next_embeddings: tuple[Float[Tensor, "batch part hidden"], ...] = ()
    """Embedding of token t+1 (t+2, ...) at position t, for each block of MTP. The last stage, which
    has MTP, has no embedding: the first one looks the vectors up, and they travel along, `hidden`
    numbers a token beside the n x hidden of the streams, so that no weight exists twice."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What crosses: all tensors, in order."""
        return (*self.streams.tensors(), *self.next_embeddings)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], config: ModelConfig) -> "Handover":
        """The inverse of `tensors`."""
        count = 2 if config.residual == "mhc_single_pass" else 1
        return cls(Streams.of(*tensors[:count]), tuple(tensors[count:]))


def empty_handover(config: ModelConfig, batch: int, part: int, dtype: torch.dtype) -> Handover:
    """Shapes and types of what crosses, without data.

    Args:
        config: the model.
        batch: sequences of a microbatch.
        part: tokens of a sequence on this rank.
        dtype: of the streams.
    """
    hidden = torch.empty(batch, part, config.hidden_size, dtype=dtype, device="meta")
    return Handover(expand_streams(hidden, config), (hidden,) * config.mtp_depth)


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
