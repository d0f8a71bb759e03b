"""Frames of a clip: which ones, and their pixels; called by `data.pictures`.

Only the frames that are taken are decoded, and those since the keyframe before each: a clip is
seeked, and its frames are known by their times, so that variable frame rates are exact.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.images import UndecodableError, resize, undecodable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""What is opened. Other demuxers include playlists, which name further files."""


def frame_numbers(
    frames: int,
    fps: float,
    *,
    frames_per_second: float,
    max_frames: int,
    frames_per_patch: int,
) -> list[int]:
    """Which frames of a clip are taken; a pure function of its length.

    `frames_per_second` of them from the first on; spread evenly from the first to the last where
    that would be more than `max_frames`. Their number is a multiple of `frames_per_patch`, rounded
    down; a clip that has not so many repeats its last.

    Args:
        frames: of the clip.
        fps: of the clip.
        frames_per_second: wanted; every frame where the clip has fewer.
        max_frames: at least frames_per_patch.
        frames_per_patch: frames of a group, which become one plane of rows.

    Returns:
        Numbers from 0, ascending.

    Raises:
        ValueError: max_frames is below frames_per_patch.
    """
    if max_frames < frames_per_patch:
        raise ValueError(
            f"data.image.max_frames={max_frames}: must hold model.vision.frames_per_patch="
            f"{frames_per_patch}; use {frames_per_patch} or more"
        )
    step = max(1.0, fps / frames_per_second)
    wanted = int((frames - 1) / step) + 1
    if wanted > max_frames:
        wanted = max_frames // frames_per_patch * frames_per_patch
        # Rounded half up, in whole numbers.
        gaps = max(1, wanted - 1)
        return [(2 * k * (frames - 1) + gaps) // (2 * gaps) for k in range(wanted)]
    taken = max(frames_per_patch, wanted // frames_per_patch * frames_per_patch)
    return [min(frames - 1, int(min(k, wanted - 1) * step + 0.5)) for k in range(taken)]


def decode_frames(
    payload: bytes, numbers: Sequence[int], *, stored: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Decode and resize frames of a video file.

    Args:
        payload: the encoded file.
        numbers: of the frames in the order they are shown, from 0; ascending.
        stored: width and height by the index.
        size: width and height to return.

    Returns:
        RGB, [frames, height, width, 3].

    Raises:
        UndecodableError: it is no video, cut short, has fewer frames, or another size.
        ImportError: PyAV is not installed.
    """
    try:
        import av  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            "the corpus holds video, which PyAV decodes; type: pip install 'mneme[video]'"
        ) from error
    options = {"format_whitelist": _FORMATS}
    with undecodable(), av.open(BytesIO(payload), "r", options=options) as container:
        shown = {
            number: resize(frame.to_ndarray(format="rgb24"), size)
            for number, frame in _frames(container, sorted(set(numbers)), stored)
        }
    return np.stack([shown[number] for number in numbers])


def _frames(
    container: "InputContainer", numbers: Sequence[int], stored: tuple[int, int]
) -> Iterator[tuple[int, Any]]:
    """The frames of these numbers."""
    if not container.streams.video:
        raise UndecodableError("holds no video")
    stream = container.streams.video[0]
    stream.thread_count = 1  # worker processes are the parallelism
    if (stream.width, stream.height) != stored:
        raise UndecodableError(
            f"{stream.width} x {stream.height} pixels, but {stored[0]} x {stored[1]} by the index"
        )
    times, keys = _times(container, stream)
    if numbers[-1] >= len(times):
        raise UndecodableError(f"{len(times)} frames, but {numbers[-1] + 1} by the index")
    wanted = {times[number]: number for number in numbers}
    at: int | None = None
    frames: Iterator[Any] = iter(())
    for number in numbers:
        time = times[number]
        key = max((k for k in keys if k[0] <= time), default=keys[0])
        if at is None or key[0] > at:
            container.seek(key[1], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is not None and frame.pts >= time:
                break
        else:
            raise UndecodableError(f"ends before frame {number}")
        if frame.pts != time:
            raise UndecodableError(f"frame {number} cannot be decoded")
        at = time
        yield wanted[time], frame


def _times(
    container: "InputContainer", stream: "VideoStream"
) -> tuple[list[int], list[tuple[int, int]]]:
    """When each frame is shown, and when each keyframe is shown and decoded, in the stream's time base.

    Reads the packets of the file and decodes none.
    """
    packets = [packet for packet in container.demux(stream) if not packet.is_discard]
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    keys = [
        (packet.pts, packet.pts if packet.dts is None else packet.dts)
        for packet in packets
        if packet.is_keyframe and packet.pts is not None
    ]
    return times, sorted(keys)
