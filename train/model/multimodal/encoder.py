"""Vision transformer over the patches of each frame; called by `tower`.

The block of Pixtral (arXiv 2410.07073): pre-norm RMSNorm, SwiGLU, no biases, rotary
positions in two dimensions, so any resolution and aspect ratio. A parity test holds it to that.
Its pairs of channels are interleaved, as everywhere in this model: a permutation of Pixtral's.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.ffn import FeedForward
from train.model.multimodal.config import VisionEncoderConfig
from train.model.norm import RMSNorm
from train.model.rotary import axis_positions, rotary_tables, rotate

Tables = tuple[Float[Tensor, "1 patches pairs"], Float[Tensor, "1 patches pairs"]]


class VisionEncoder(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, config: VisionEncoderConfig, eps: float) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta
        self.layers = nn.ModuleDict(
            {str(i): VisionBlock(config, eps) for i in range(config.num_layers)}
        )
        self.norm = RMSNorm(config.hidden_size, eps)

    def forward(
        self,
        x: Float[Tensor, "1 patches width"],
        coordinates: Int[Tensor, "1 patches 2"],
        frame_lengths: Sequence[int],
    ) -> Float[Tensor, "1 patches width"]:
        """Mix the patches of each frame.

        Args:
            x: embedded patches, frame after frame.
            coordinates: row and column of each patch in its image.
            frame_lengths: patches of each frame.
        """
        # Rows and columns take turns, so that each has low and high frequencies.
        positions = axis_positions(coordinates, (self.head_dim // 4, self.head_dim // 4))
        tables = rotary_tables(positions, self.head_dim, self.theta)
        for layer in self.layers.values():
            x = layer(x, tables, frame_lengths)
        normalised: Tensor = self.norm(x)
        return normalised


class VisionBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(self, config: VisionEncoderConfig, eps: float) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = RMSNorm(hidden, eps)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = RMSNorm(hidden, eps)
        self.ffn = FeedForward(hidden, config.intermediate_size, limit=None)

    def forward(
        self,
        x: Float[Tensor, "1 patches width"],
        tables: Tables,
        frame_lengths: Sequence[int],
    ) -> Float[Tensor, "1 patches width"]:
        """Transform the patches; see `VisionEncoder.forward`."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)
        mixed = attend_within_frames(rotate(q, *tables), rotate(k, *tables), v, frame_lengths)
        x = x + self.o(mixed.flatten(2))
        result: Tensor = x + self.ffn(self.ffn_norm(x))
        return result


def attend_within_frames(
    query: Float[Tensor, "1 patches heads head_dim"],
    key: Float[Tensor, "1 patches heads head_dim"],
    value: Float[Tensor, "1 patches heads head_dim"],
    frame_lengths: Sequence[int],
) -> Float[Tensor, "1 patches heads head_dim"]:
    """Softmax attention of every patch to all patches of its frame, and to no other.

    Frames in a row that have the same length, such as those of a video, are computed together.
    torch's fused kernel keeps no matrix of patches x patches.

    Args:
        query: frame after frame.
        key: likewise.
        value: likewise.
        frame_lengths: patches of each frame; their sum is all patches.
    """
    runs = [(length, len(list(run))) for length, run in groupby(frame_lengths)]
    # Without any frame the empty tensors still pass through, so that each weight has a gradient.
    runs = runs or [(0, 1)]
    sizes = [length * count for length, count in runs]
    outputs = []
    pieces = zip(*(torch.split(x[0], sizes) for x in (query, key, value)), strict=True)
    for (length, count), run in zip(runs, pieces, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in run)
        out = F.scaled_dot_product_attention(q, k, v)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)
