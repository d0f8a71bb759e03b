"""What an image or clip says of itself: `data.foreign` asks for its size, `data.verify` decodes it.

What is opened is decided by the name's ending, never by what the bytes claim to be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data.images import UndecodableError, decode_image, image_size
from data.index import Medium, MediumKind

if TYPE_CHECKING:
    from av.container import InputContainer

_IMAGES = ("jpg", "jpeg", "png", "webp")
# Ending -> FFmpeg's demuxer. It has others that follow paths and addresses in the file.
_VIDEOS = {"mp4": "mov", "webm": "matroska", "mkv": "matroska", "avi": "avi"}


@dataclass(frozen=True, slots=True)
class MediaHeader:
    """Size of an image or clip."""

    kind: MediumKind
    width: int
    """In pixels, as it is looked at."""
    height: int
    frames: int = 1
    """1 for images."""
    fps: float = 0.0
    """Frames per second; 0 for images."""


def media_kind(extension: str) -> MediumKind | None:
    """What a member of a sample is, by its extension; None: no medium."""
    ending = _ending(extension)
    if ending in _IMAGES:
        return "image"
    return "video" if ending in _VIDEOS else None


def read_header(extension: str, payload: bytes) -> MediaHeader:
    """Find the size, without decoding.

    Args:
        extension: of the member; `media_kind` knows it.
        payload: the file.

    Raises:
        UndecodableError: it is none.
        ImportError: PyAV is missing, for a clip.
    """
    if media_kind(extension) == "image":
        with _undecodable():
            return MediaHeader("image", *image_size(payload))
    with _undecodable(), _opened(extension, payload) as (container, stream):
        packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        rate = stream.average_rate or stream.guessed_rate
        if not packets or not rate or not stream.width or not stream.height:
            raise UndecodableError("has no frames, no size or no frame rate")
        return MediaHeader("video", stream.width, stream.height, len(packets), float(rate))


def check_decodes(extension: str, payload: bytes, medium: Medium) -> None:
    """Decode all of a medium.

    Raises:
        UndecodableError: it cannot be decoded, or is not as the index describes it.
        ImportError: PyAV is missing, for a clip.
    """
    size = (medium.width, medium.height)
    if medium.kind == "image":
        with _undecodable():
            decode_image(payload, stored=size, size=size)
        return
    with _undecodable(), _opened(extension, payload) as (container, stream):
        frames = 0
        for frame in container.decode(stream):
            if (frame.width, frame.height) != size:
                raise UndecodableError(f"frames of another size than {size[0]} x {size[1]} pixels")
            frames += 1
    if frames < medium.first_frame + medium.frames:
        raise UndecodableError(
            f"{frames} frames can be decoded, but {medium.first_frame + medium.frames} are listed"
        )


@contextmanager
def _opened(extension: str, payload: bytes) -> Iterator[tuple["InputContainer", Any]]:
    try:
        import av  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            "there are clips, which PyAV reads; type: pip install 'mneme[video]'"
        ) from error
    with av.open(BytesIO(payload), format=_VIDEOS[_ending(extension)]) as container:
        assert isinstance(container, av.container.InputContainer)
        if not container.streams.video:
            raise UndecodableError("holds no video")
        stream = container.streams.video[0]
        stream.thread_count = 1  # processes are the parallelism
        yield container, stream


@contextmanager
def _undecodable() -> Iterator[None]:
    """Damaged bytes make the libraries raise errors of many types."""
    try:
        yield
    except (UndecodableError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def _ending(extension: str) -> str:
    return PurePosixPath("x." + extension).suffix[1:].lower()
