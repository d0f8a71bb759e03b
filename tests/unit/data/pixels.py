"""Pictures made of numbers, for tests of where they go."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours that are different for every seed: [height, width, 3]."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Encoded."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def assert_rounds_alike(found: NDArray[np.uint8], wanted: Any) -> None:
    """The same picture, resized by another library: one of 255 off in one value of a hundred at most."""
    difference = np.abs(found.astype(int) - np.asarray(wanted, int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
