"""Clips: which frames, decoding against all frames one by one, and what is refused."""

import random
import sys
from io import BytesIO
from typing import Any

import av
import numpy as np
import pytest

from data.images import UndecodableError
from data.video import decode_frames, frame_numbers
from tests.unit.data.clips import ENCODINGS, SIZE, decode_one_by_one, encode


@pytest.mark.parametrize(
    ("frames", "fps", "per_patch", "expected"),
    [
        (50, 25.0, 1, [0, 13, 25, 38]),  # every 12.5 frames, half rounded up
        (50, 25.0, 2, [0, 13, 25, 38]),
        (76, 25.0, 2, [0, 13, 25, 38, 50, 63]),  # the seventh, 75, has no partner
        (3, 1.0, 1, [0, 1, 2]),  # slower than wanted: every frame
        (1, 25.0, 1, [0]),
        (1, 25.0, 2, [0, 0]),  # too short: its last again
        (20, 25.0, 3, [0, 13, 13]),
        (1000, 25.0, 1, [0, 143, 285, 428, 571, 714, 856, 999]),  # over eight: from end to end
        (1000, 25.0, 3, [0, 200, 400, 599, 799, 999]),
    ],
)
def test_frames_by_hand(frames: int, fps: float, per_patch: int, expected: list[int]) -> None:
    found = frame_numbers(
        frames, fps, frames_per_second=2.0, max_frames=8, frames_per_patch=per_patch
    )
    assert found == expected


def test_too_few_frames_for_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.image\.max_frames=1: must hold .*=2; use 2"):
        frame_numbers(9, 25.0, frames_per_second=2.0, max_frames=1, frames_per_patch=2)


@pytest.mark.parametrize(
    ("name", "variable_rate"), [*((name, False) for name in ENCODINGS), ("h264", True)]
)
def test_chosen_frames_are_those_of_decoding_one_by_one(name: str, variable_rate: bool) -> None:
    payload = encode(name, variable_rate=variable_rate)
    every = decode_one_by_one(payload)
    assert len(every) == 60
    for trial in range(6):
        numbers = sorted(random.Random(trial).choices(range(60), k=5))
        found = decode_frames(payload, numbers, stored=SIZE, size=SIZE)
        np.testing.assert_array_equal(found, [every[number] for number in numbers])


def test_frames_are_resized_as_images_are() -> None:
    payload = encode("h264")
    found = decode_frames(payload, [30], stored=SIZE, size=(64, 32))
    assert found.shape == (1, 32, 64, 3)
    whole = decode_one_by_one(payload)[30]
    assert np.abs(found.mean((0, 1, 2)) - whole.mean((0, 1))).max() < 2


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"payload": b""}, "InvalidDataError|EOFError"),
        ({"payload": b"no video"}, "InvalidDataError"),
        ({"payload": PLAYLIST}, "InvalidDataError"),  # opens no further file
        ({"payload": encode("h264")[:-3000]}, "InvalidDataError"),
        ({"payload": encode("matroska")[:20_000]}, "frames, but 60 by the index|ends before"),
        ({"numbers": [60]}, "60 frames, but 61 by the index"),
        ({"stored": (144, 176)}, "176 x 144 pixels, but 144 x 176 by the index"),
    ],
    ids=["empty", "text", "playlist", "short mp4", "short matroska", "few frames", "size"],
)
def test_what_cannot_be_decoded_says_so(arguments: dict[str, Any], problem: str) -> None:
    given: dict[str, Any] = {"payload": encode("h264"), "numbers": [59], "stored": SIZE}
    with pytest.raises(UndecodableError, match=problem):
        decode_frames(**(given | arguments), size=(32, 32))


def test_sound_alone_is_no_video() -> None:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UndecodableError, match="holds no video"):
        decode_frames(file.getvalue(), [0], stored=SIZE, size=SIZE)


def test_without_pyav_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'mneme\[video\]'"):
        decode_frames(b"", [0], stored=SIZE, size=SIZE)
