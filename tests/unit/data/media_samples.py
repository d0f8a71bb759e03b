"""Small images and clips, made by Pillow and PyAV."""

from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """A gradient with noise: [height, width, 3]."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    plane = (x + y) / 2 + rng.integers(0, 40, (height, width))
    return np.stack([plane, plane[::-1], plane[:, ::-1]], axis=-1).astype(np.uint8)


def image(width: int, height: int, *, form: str = "JPEG", seed: int = 0) -> bytes:
    """An image file; `form` as Pillow calls it."""
    file = BytesIO()
    Image.fromarray(pixels(width, height, seed)).save(file, form)
    return file.getvalue()


def clip(width: int, height: int, *, frames: int, fps: int, form: str = "mp4") -> bytes:
    """A video file; `form` as FFmpeg calls the container: mp4, webm, matroska, avi."""
    codec = {"mp4": "libx264", "webm": "libvpx", "matroska": "libx264", "avi": "mpeg4"}[form]
    file = BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(width, height, number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
