"""The order of pixels and patches, pixel by pixel, and the split of a batch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.vision import VisionInput, patch_coordinates, patchify


def test_every_pixel_is_where_the_order_says() -> None:
    size, frames_per_patch, merge, channels = 2, 3, 2, 3
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 12, channels)).astype(np.uint8)
    patches, grid = patchify(
        frames, patch_size=size, frames_per_patch=frames_per_patch, spatial_merge=merge
    )
    assert grid == (2, 4, 6)
    assert patches.dtype == np.uint8
    coordinates = patch_coordinates(np.array([grid]), merge)
    assert len(patches) == len(coordinates) == 2 * 4 * 6
    for number, (patch, (row, column)) in enumerate(zip(patches, coordinates, strict=True)):
        first = number // 24 * frames_per_patch
        square = frames[
            first : first + frames_per_patch,
            row * size : (row + 1) * size,
            column * size : (column + 1) * size,
        ]
        assert np.array_equal(
            patch.reshape(channels, frames_per_patch, size, size), square.transpose(3, 0, 1, 2)
        )
    # Patches of a block stand together, blocks go row by row, frame groups one after the other.
    assert coordinates[:8].tolist() == [
        *[[0, 0], [0, 1], [1, 0], [1, 1]],
        *[[0, 2], [0, 3], [1, 2], [1, 3]],
    ]
    assert coordinates[12:14].tolist() == [[2, 0], [2, 1]]
    assert np.array_equal(coordinates[:24], coordinates[24:])


def test_coordinates_of_several_images_follow_each_other() -> None:
    found = patch_coordinates(np.array([[1, 1, 2], [1, 2, 1]]), 1)
    assert found.tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]]
    assert patch_coordinates(np.empty((0, 3), np.int64), 2).shape == (0, 2)


@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (2, 6, 8, 3), (2, 8, 10, 3)])
def test_sizes_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be multiples of 2 frames and 4 pixels"):
        patchify(np.zeros(shape, np.uint8), patch_size=2, frames_per_patch=2, spatial_merge=2)


def test_other_than_three_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="4 values for each pixel: must be 3"):
        patchify(
            np.zeros((2, 8, 8, 4), np.uint8), patch_size=2, frames_per_patch=2, spatial_merge=2
        )


def example() -> VisionInput:
    """Three sequences with one, no and two images of 2, 1 and 4 patches."""
    return VisionInput(
        patches=torch.arange(7, dtype=torch.uint8).view(7, 1),
        grids=torch.tensor([[1, 1, 2], [1, 1, 1], [2, 2, 1]]),
        images_per_sequence=torch.tensor([1, 0, 2]),
        rope_positions=torch.arange(3 * 5 * 3).view(3, 5, 3),
    )


def test_sequences_take_their_images_along() -> None:
    whole = example()
    assert whole.patches_per_sequence().tolist() == [2, 0, 5]
    first, second, third = (whole.select(slice(i, i + 1)) for i in range(3))
    assert first.patches.flatten().tolist() == [0, 1]
    assert second.patches.shape == (0, 1)
    assert second.grids.shape == (0, 3)
    assert third.patches.flatten().tolist() == [2, 3, 4, 5, 6]
    assert third.grids.tolist() == [[1, 1, 1], [2, 2, 1]]
    assert torch.equal(third.rope_positions, whole.rope_positions[2:])
    rest = whole.select(slice(1, 9))  # beyond the end, as a last microbatch may be
    assert torch.equal(rest.patches, third.patches)
    assert rest.images_per_sequence.tolist() == [0, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"patches": torch.zeros(6, 1, dtype=torch.uint8)},
        {"images_per_sequence": torch.tensor([1, 0, 1])},
    ],
)
def test_counts_that_disagree_are_refused(changes: dict[str, Tensor]) -> None:
    fields = {**vars(example()), **changes}
    with pytest.raises(ValueError, match="both must agree"):
        VisionInput(**fields)
