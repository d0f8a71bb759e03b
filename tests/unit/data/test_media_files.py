"""Sizes of images and clips from their headers, against what was encoded."""

import sys
from io import BytesIO

import pytest
from PIL import Image

from data.images import UndecodableError
from data.index import Medium
from data.media_files import MediaHeader, check_decodes, media_kind, read_header
from tests.unit.data.media_samples import clip, image


@pytest.mark.parametrize(
    ("extension", "kind"),
    [
        ("jpg", "image"),
        ("m0.JPEG", "image"),
        ("png", "image"),
        ("webp", "image"),
        ("m1.mp4", "video"),
        ("webm", "video"),
        ("avi", "video"),
        ("mkv", "video"),
        ("txt", None),
        ("jpg.txt", None),
        ("pyd", None),
        ("m3u8", None),
    ],
)
def test_the_ending_decides_what_is_opened(extension: str, kind: str | None) -> None:
    assert media_kind(extension) == kind


@pytest.mark.parametrize(("extension", "form"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_images(extension: str, form: str) -> None:
    payload = image(37, 21, form=form)
    assert read_header(extension, payload) == MediaHeader("image", 37, 21)
    medium = Medium(member=0, place=0, kind="image", width=37, height=21)
    check_decodes(extension, payload, medium)
    with pytest.raises(UndecodableError):
        check_decodes(extension, payload[: len(payload) // 2], medium)


def test_size_is_that_of_the_upright_image() -> None:
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(BytesIO(image(37, 21))).save(file, "JPEG", exif=exif)
    assert read_header("jpg", file.getvalue()) == MediaHeader("image", 21, 37)


@pytest.mark.parametrize(
    ("extension", "form"),
    [("mp4", "mp4"), ("webm", "webm"), ("mkv", "matroska"), ("avi", "avi")],
)
def test_clips(extension: str, form: str) -> None:
    payload = clip(48, 32, frames=9, fps=12, form=form)
    header = read_header(extension, payload)
    assert header == MediaHeader("video", 48, 32, 9, header.fps)
    assert header.fps == pytest.approx(12, rel=0.01)
    medium = Medium(member=0, place=0, kind="video", width=48, height=32, frames=9, fps=12.0)
    check_decodes(extension, payload, medium)
    longer = Medium(member=0, place=0, kind="video", width=48, height=32, frames=9, first_frame=1)
    with pytest.raises(UndecodableError, match="9 frames can be decoded, but 10 are listed"):
        check_decodes(extension, payload, longer)
    other = Medium(member=0, place=0, kind="video", width=32, height=48, frames=9)
    with pytest.raises(UndecodableError, match="another size than 32 x 48"):
        check_decodes(extension, payload, other)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("extension", ["jpg", "mp4", "webm", "avi"])
@pytest.mark.parametrize("payload", [b"", b"nothing", PLAYLIST, b"ffconcat version 1.0\nfile x\n"])
def test_what_is_no_medium_is_refused(extension: str, payload: bytes) -> None:
    with pytest.raises(UndecodableError):
        read_header(extension, payload)


def test_missing_pyav_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'mneme\[video\]'"):
        read_header("mp4", b"")
