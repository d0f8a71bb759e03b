"""Looks into picture and video files: are they what they seem, and how large; where may they lie.

Every picture and every frame is decoded once, so that a corpus holds none that training could not
read; `data.pictures` finds the same sizes and numbers of frames.
"""

import re
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from PIL import Image

from data.images import UndecodableError, decode_image, image_size
from data.importers.drafts import DraftMedium
from data.index import Medium
from data.media_files import check_decodes, read_header

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi")
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class UnusableMediumError(ValueError):
    """A file does not go into the corpus. The text is the cause, alike for all files with it."""


def look_at_image(reference: str, payload: bytes) -> DraftMedium:
    """Size of a picture, which is decoded to see that it can be.

    Raises:
        UnusableMediumError: it cannot.
    """
    try:
        width, height = size = image_size(payload)
        decode_image(payload, stored=size, size=size)
    except UndecodableError as error:
        raise UnusableMediumError("image cannot be decoded") from error
    with Image.open(BytesIO(payload)) as image:
        kind = image.format or ""
    return DraftMedium(
        reference=reference,
        extension=_EXTENSIONS.get(kind, kind.lower()),
        kind="image",
        width=width,
        height=height,
    )


def look_at_video(reference: str, path: Path, clip_seconds: float | None) -> list[DraftMedium]:
    """Size and length of a video, all of which is decoded to see that it can be.

    Args:
        reference: of the file.
        path: of the file.
        clip_seconds: a longer video becomes several clips of this length; None: one.

    Raises:
        UnusableMediumError: it cannot be decoded, or is cut short.
    """
    extension, payload = path.suffix[1:].lower(), path.read_bytes()
    try:
        found = read_header(extension, payload)
        whole = Medium(member=0, place=0, **asdict(found))
        check_decodes(extension, payload, whole)
    except UndecodableError as error:
        raise UnusableMediumError("video cannot be decoded") from error
    length = max(1, round(found.fps * clip_seconds)) if clip_seconds else found.frames
    return [
        DraftMedium(
            reference=reference,
            extension=extension,
            kind="video",
            width=found.width,
            height=found.height,
            frames=min(length, found.frames - first),
            fps=found.fps,
            first_frame=first,
        )
        for first in range(0, found.frames, length)
    ]


def require_video() -> None:
    """Check that videos can be decoded here.

    Raises:
        ValueError: PyAV is not installed.
    """
    if find_spec("av") is None:
        raise ValueError("--videos: needs PyAV to decode them; type: pip install 'mneme[video]'")


def local_image(root: Path, name: str) -> Path:
    """The file that a document names.

    Args:
        root: folder that it must lie in; resolved.
        name: path relative to it.

    Raises:
        ValueError: it is a URL.
        UnusableMediumError: it lies elsewhere, or is missing.
    """
    if _URL.match(name):
        raise ValueError(
            f"{name[:200]}: is a URL; download the images first (img2dataset does), and put their "
            "paths below --image-root into the documents"
        )
    path = (root / name).resolve()
    if "\0" in name or not path.is_relative_to(root):
        raise UnusableMediumError("path outside --image-root")
    if not path.is_file():
        raise UnusableMediumError("image is missing")
    return path
