"""Images and video of a batch: `data.packing.Batch` carries them, `train.model.multimodal` reads.

    patch       pixels of one square of `frames_per_patch` frames, flattened (channel, frame, row,
                column): what a convolution whose stride is its kernel multiplies with its weights
    block       merge x merge patches that become one row, hence one placeholder in the text
    order       frame group, block row, block column, then row and column within the block

Bytes travel as they were decoded; the device normalises them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from data.planes import planes


@dataclass(frozen=True)
class VisionInput:
    """Images (and clips: an image is a clip of one frame group) of packed sequences, in order."""

    patches: UInt8[Tensor, "patches values"]
    """All patches of all images, in the order above."""
    grids: Int64[Tensor, "images 3"]
    """Patches of each image in t, h and w. Stays on the host."""
    images_per_sequence: Int64[Tensor, "sequences"]
    """How many of the images belong to each sequence. Stays on the host."""
    rope_positions: Int64[Tensor, "sequences sequence_length 3"]
    """(t, h, w) of each token for the rotary embedding; see `data.positions`."""

    def __post_init__(self) -> None:
        """Counts that must agree: a mistake here would give images to other sequences."""
        patches, images = int(self.grids.prod(1).sum()), int(self.images_per_sequence.sum())
        if patches != len(self.patches) or images != len(self.grids):
            raise ValueError(
                f"{len(self.patches)} patches where the grids have {patches}, or {len(self.grids)} "
                f"grids where the sequences have {images} images; both must agree"
            )

    def patches_per_sequence(self) -> Int64[Tensor, "sequences"]:
        """Patches of each sequence's images."""
        per_image = self.grids.prod(1)
        owner = torch.arange(len(self.images_per_sequence)).repeat_interleave(
            self.images_per_sequence
        )
        return torch.zeros_like(self.images_per_sequence).index_add_(0, owner, per_image)

    def select(self, rows: slice) -> "VisionInput":
        """The images of these sequences."""
        images = _range(self.images_per_sequence, rows)
        patches = _range(self.patches_per_sequence(), rows)
        return VisionInput(
            patches=self.patches[patches],
            grids=self.grids[images],
            images_per_sequence=self.images_per_sequence[rows],
            rope_positions=self.rope_positions[rows],
        )

    def to(self, device: torch.device) -> "VisionInput":
        """Pixels and positions on `device`; the sizes stay on the host."""
        return VisionInput(
            patches=self.patches.to(device),
            grids=self.grids,
            images_per_sequence=self.images_per_sequence,
            rope_positions=self.rope_positions.to(device),
        )


def _range(counts: Int64[Tensor, "sequences"], rows: slice) -> slice:
    """Where the items of consecutive sequences lie, given how many each has."""
    start, stop, step = rows.indices(len(counts))
    assert step == 1, rows
    return slice(int(counts[:start].sum()), int(counts[:stop].sum()))


def patchify(
    frames: NDArray[np.uint8], *, patch_size: int, frames_per_patch: int, spatial_merge: int
) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
    """Cut an image or clip into patches, in the order of this module.

    Args:
        frames: [frames, height, width, 3]; the frames of an image are equal.
        patch_size: height and width of a patch in pixels.
        frames_per_patch: must divide the frames.
        spatial_merge: with patch_size, must divide height and width.

    Returns:
        Patches [t h w, channels frames_per_patch patch_size^2], and the grid (t, h, w) of patches.

    Raises:
        ValueError: the sizes do not divide, or there are not three channels.
    """
    number, height, width, channels = frames.shape
    side = patch_size * spatial_merge
    if number % frames_per_patch or height % side or width % side:
        raise ValueError(
            f"{number} frames of {height} x {width} pixels: must be multiples of {frames_per_patch} "
            f"frames and {side} pixels; repeat frames and resize first"
        )
    t, h, w = number // frames_per_patch, height // patch_size, width // patch_size
    # A row of a patch is what moves, as one item: numpy takes a third of the time for it.
    rows = planes(frames).view(np.dtype((np.void, patch_size)))
    blocks = (h // spatial_merge, spatial_merge, patch_size, w // spatial_merge, spatial_merge)
    cut = rows.reshape(t, frames_per_patch, channels, *blocks)
    # (t, frame, channel, block row, row in block, y, block column, column in block) to
    # (t, block row, block column, row in block, column in block, channel, frame, y).
    values = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5).flatten().view(np.uint8)
    return values.reshape(t * h * w, -1), (t, h, w)


def patch_coordinates(grids: NDArray[np.int64], spatial_merge: int) -> NDArray[np.int64]:
    """Row and column of every patch in its image [patches, 2], in the order of this module."""
    found = [np.empty((0, 2), np.int64)]
    for t, h, w in grids:
        blocks = (h // spatial_merge, spatial_merge, w // spatial_merge, spatial_merge)
        places = np.indices((h, w)).reshape(2, *blocks).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
        found.append(np.tile(places, (t, 1)))
    return np.concatenate(found)
