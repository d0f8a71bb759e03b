"""Bytes of an image to pixels of the size that the model takes; called by `data.pictures`.

Sizes are counted in units: a unit is the square of pixels that becomes one row, hence one token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch.nn.functional import interpolate

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Pillow's other plugins include one that starts a program (EPS)."""
_MAX_PIXELS = 2**26
"""Of an encoded image: a few kilobytes can unpack to gigabytes."""
_ROTATED = (5, 6, 7, 8)
"""Values of the EXIF orientation that exchange width and height."""


class UndecodableError(ValueError):
    """The bytes are no picture, or not the one that the index describes. Says what is wrong."""


@contextmanager
def undecodable() -> Iterator[None]:
    """Whatever a decoder raises inside becomes an UndecodableError: they have many types for damage."""
    try:
        yield
    except (UndecodableError, MemoryError):  # memory that is short now says nothing of the bytes
        raise
    except Exception as error:
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=4096)
def fit(width: int, height: int, *, unit: int, max_units: int) -> tuple[int, int]:
    """Size of a picture in units (columns, rows); a pure function of its size in pixels.

    A picture that needs more than `max_units` is made smaller. Each side is less than one unit away
    from that of a picture of the same aspect, so a side grows by less than one unit at most; only
    a picture thinner than one unit, which gets one, is distorted further.

    Args:
        width: in pixels.
        height: in pixels.
        unit: side of a unit in pixels.
        max_units: most that the picture may have, columns x rows.

    Raises:
        ValueError: an argument is below 1.
    """
    if min(width, height, unit, max_units) < 1:
        raise ValueError(f"{width} x {height} pixels, {unit=}, {max_units=}: must be 1 or more")
    scale = min(1.0, math.sqrt(max_units / (width * height)) * unit)
    x, y = width / unit * scale, height / unit * scale
    choices = [
        (columns, rows)
        for columns in _neighbours(x, max_units)
        for rows in _neighbours(y, max_units)
        if columns * rows <= max_units
    ]
    # No logarithms: divisions and roots round alike on every machine.
    return min(choices, key=lambda size: _ratio(size[0], x) * _ratio(size[1], y))


def _neighbours(side: float, most: int) -> list[int]:
    """Whole numbers below and above, between 1 and `most`."""
    return [max(1, min(most, whole)) for whole in (math.floor(side), math.ceil(side))]


def _ratio(side: int, wanted: float) -> float:
    """By which factor two sides differ, at least 1."""
    return max(side / wanted, wanted / side)


def image_size(payload: bytes) -> tuple[int, int]:
    """Width and height in pixels as it is looked at: after the camera's orientation.

    Raises:
        UndecodableError: it is no image.
    """
    with undecodable(), _opened(payload) as image:
        return _upright_size(image)


def decode_image(
    payload: bytes, *, stored: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Decode, turn upright and resize.

    Transparent parts become white. A JPEG that is much larger than needed is decoded at a reduced
    scale, which leaves at least twice the size for the resize.

    Args:
        payload: the encoded image.
        stored: width and height by the index, as `image_size` finds them.
        size: width and height to return.

    Returns:
        RGB, [height, width, 3].

    Raises:
        UndecodableError: it is no image, cut short, or of another size than `stored`.
    """
    with undecodable(), _opened(payload) as image:
        found = _upright_size(image)
        if found != stored:
            raise UndecodableError(f"{_by(found)} pixels, but {_by(stored)} by the index")
        width, height = size if found == image.size else size[::-1]
        image.draft("RGB", (2 * width, 2 * height))
        pixels = _plain_jpeg(image, payload)
        if pixels is not None:
            return resize(pixels, size)
        ImageOps.exif_transpose(image, in_place=True)
        return resize(np.array(_rgb(image)), size)


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] at another size (width, height): bicubic, antialiased.

    torch has Pillow's filter in vector instructions, and rounds to the same integers with and without
    them; some pixels in a thousand differ from Pillow's by one of 255.
    """
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    resized: NDArray[np.uint8] = found[0].permute(1, 2, 0).numpy()
    return resized


def _opened(payload: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(payload), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UndecodableError(f"none of {', '.join(_FORMATS)}") from error
    if image.width * image.height > _MAX_PIXELS:
        raise UndecodableError(f"{_by(image.size)} pixels; at most {_MAX_PIXELS} are decoded")
    return image


def _plain_jpeg(image: Image.Image, payload: bytes) -> NDArray[np.uint8] | None:
    """Pixels of an upright JPEG in colour, at the scale that `draft` chose.

    The bits are Pillow's, which has the same decoder, without its two copies into and out of 4 bytes
    a pixel. None: something else, or something is wrong with it, and Pillow says what.
    """
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(0x0112, 1) != 1:
        return None
    width, height = image.size
    try:
        pixels = decode_jpeg(
            payload, fastdct=False, fastupsample=False, min_width=width, min_height=height
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = image.getexif().get(0x0112)
    width, height = image.size
    return (height, width) if orientation in _ROTATED else (width, height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # of which Pillow would keep the low bits
        eight = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if image.mode in ("I", "F"):
        raise UndecodableError(f"pixels of mode {image.mode} have no range; use 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
