"""Images: sizes, decoding against Pillow by hand, and what is refused."""

import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import UndecodableError, decode_image, fit, image_size, resize
from tests.unit.data.pixels import assert_rounds_alike


def photograph() -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), (1, 1)),
        ((1, 1), (1, 1)),  # never less than one unit
        ((256, 256), (8, 8)),
        ((250, 260), (8, 8)),  # to the nearer multiple
        ((300, 150), (9, 5)),  # 9.4 x 4.7 units
        ((4000, 3000), (9, 7)),  # 9.2 x 6.9 of 64 units
        ((4000, 4000), (8, 8)),
        ((10, 100_000), (1, 64)),  # a line
        ((100_000, 10), (64, 1)),
    ],
)
def test_sizes_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(*size, unit=32, max_units=64) == expected


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        fit(0, 3, unit=32, max_units=64)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_is_decoded_as_pillow_does(form: str) -> None:
    payload = encoded(photograph().resize((90, 70)), form)
    wanted = Image.open(BytesIO(payload)).convert("RGB").resize((64, 32), Image.Resampling.BICUBIC)
    found = decode_image(payload, stored=(90, 70), size=(64, 32))
    assert_rounds_alike(found, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:0", "progressive": True},
        {"subsampling": "4:2:0", "quality": 9},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_jpegs_have_the_bits_of_pillow(options: dict[str, Any]) -> None:
    """Of the two decoders, at every scale and with odd sides."""
    for width, height in ((509, 601), (64, 32), (17, 3)):
        picture = photograph().resize((width, height))
        payload = encoded(picture, "JPEG", **options)
        for divisor in (1, 2, 4, 8, 16):
            size = (max(1, width // divisor), max(1, height // divisor))
            wanted = Image.open(BytesIO(payload))
            wanted.draft("RGB", (2 * size[0], 2 * size[1]))
            found = decode_image(payload, stored=(width, height), size=size)
            np.testing.assert_array_equal(found, resize(np.array(wanted), size))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.97])
def test_a_jpeg_that_is_cut_short_is_what_pillow_says(cut: float) -> None:
    payload = encoded(photograph(), "JPEG")
    payload = payload[: int(len(payload) * cut)]
    with pytest.raises(UndecodableError, match="truncated"):
        decode_image(payload, stored=photograph().size, size=(64, 64))


def test_every_processor_rounds_alike() -> None:
    """A run may go on on another machine: resizing with vector instructions changes no bit."""
    program = (
        "import numpy as np; from data.images import resize;"
        "from tests.unit.data.pixels import noise;"
        "print([resize(noise(90, 70, 1), size).astype(int).cumsum()[-99:].tolist()"
        " for size in ((64, 32), (128, 96), (7, 200))])"
    )
    plain, vectors = (
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | capability,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for capability in ({"ATEN_CPU_CAPABILITY": "default"}, {})
    )
    assert plain == vectors != ""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_of_the_camera(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(photograph().resize((96, 64)), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(payload)))
    assert image_size(payload) == upright.size == ((64, 96) if orientation > 4 else (96, 64))
    wanted = upright.resize((64, 64), Image.Resampling.BICUBIC)
    found = decode_image(payload, stored=upright.size, size=(64, 64))
    assert_rounds_alike(found, wanted)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_at_a_reduced_scale_and_look_alike(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(photograph(), "JPEG", quality=95, exif=exif)
    whole = ImageOps.exif_transpose(Image.open(BytesIO(payload)))
    size = (whole.width // 8, whole.height // 8)
    wanted = np.asarray(whole.resize(size, Image.Resampling.BICUBIC), int)
    found = decode_image(payload, stored=whole.size, size=size).astype(int)
    difference = np.abs(found - wanted)
    assert 0 < difference.mean() < 1.5  # of 255; not equal, so the reduced scale was used


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(mode: str) -> None:
    image = photograph().resize((32, 32)).convert(mode)
    image.putalpha(0)
    found = decode_image(encoded(image), stored=(32, 32), size=(32, 32))
    assert (found == 255).all()


def test_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    found = decode_image(encoded(image, transparency=1), stored=(32, 32), size=(32, 32))
    assert (found == 255).all()


def test_sixteen_bits_lose_the_lower_eight() -> None:
    values = (np.arange(32 * 32, dtype=np.uint16) * 60).reshape(32, 32)
    found = decode_image(encoded(Image.fromarray(values)), stored=(32, 32), size=(32, 32))
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_grey_and_four_inks() -> None:
    grey, inks = photograph().convert("L"), photograph().convert("CMYK")
    for image in (grey, inks):
        payload = encoded(image.resize((32, 32)), "JPEG")
        wanted = Image.open(BytesIO(payload)).convert("RGB")
        found = decode_image(payload, stored=(32, 32), size=(32, 32))
        np.testing.assert_array_equal(found, np.asarray(wanted))


def bomb() -> bytes:
    """A PNG header of 60,000 x 60,000 pixels."""
    payload = encoded(Image.new("RGB", (8, 8)))
    header = payload[12:16] + struct.pack(">II", 60_000, 60_000) + payload[24:29]
    return payload[:12] + header + struct.pack(">I", zlib.crc32(header)) + payload[33:]


PICTURE = encoded(photograph().resize((64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"", "none of JPEG, PNG"),
        (b"no image at all", "none of JPEG, PNG"),
        (PICTURE[: len(PICTURE) // 2], "truncated"),
        (encoded(photograph().resize((64, 64)))[:900], "OSError|SyntaxError|truncated"),
        (bomb(), "DecompressionBomb"),
        (encoded(Image.new("F", (64, 64)), "TIFF"), "mode F have no range"),
        (encoded(photograph().resize((64, 64)), "EPS"), "none of JPEG, PNG"),  # a program
    ],
    ids=["empty", "text", "short JPEG", "short PNG", "bomb", "no range", "EPS"],
)
def test_what_cannot_be_decoded_says_so(payload: bytes, problem: str) -> None:
    with pytest.raises(UndecodableError, match=problem):
        decode_image(payload, stored=(64, 64), size=(32, 32))


def test_large_images_are_refused_below_the_limit_of_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.images._MAX_PIXELS", 4000)
    with pytest.raises(UndecodableError, match="64 x 64 pixels; at most 4000 are decoded"):
        decode_image(PICTURE, stored=(64, 64), size=(32, 32))


def test_another_size_than_in_the_index_is_refused() -> None:
    with pytest.raises(UndecodableError, match="64 x 64 pixels, but 64 x 63 by the index"):
        decode_image(PICTURE, stored=(64, 63), size=(32, 32))
