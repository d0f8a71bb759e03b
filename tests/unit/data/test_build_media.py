"""Pictures, clips and interleaved documents become shards: the same bytes, the right places and sizes."""

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from data.index import ShardIndex
from data.manifest import Manifest
from tests.unit.data.imports import build, samples

MARKER = 2  # <|reserved|>


def picture(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    values = np.arange(width * height * 3, dtype=np.int64) * 7919 % 251
    pixels = values.reshape(height, width, 3).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def film(path: Path, frames: int, *, fps: int = 10, width: int = 64, height: int = 48) -> None:
    with av.open(str(path), "w") as container:
        codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            pixels = np.full((height, width, 3), i * 5 % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def media_by_key(source: Path) -> dict[str, list[Any]]:
    indexes = [ShardIndex.open(tar) for tar in source.glob("*.tar")]
    return {index.key(i): index.media(i) for index in indexes for i in range(len(index))}


def words(sample: dict[str, Any], tokenizer: Path) -> list[str | int]:
    """Stored tokens as texts between markers, and the end."""
    loaded = Tokenizer.from_file(str(tokenizer))
    found: list[str | int] = []
    text: list[int] = []
    for token in np.frombuffer(sample["u16"], "<u2").tolist():
        if token in (0, MARKER):
            found += [loaded.decode(text, skip_special_tokens=False)] if text else []
            found.append(token)
            text = []
        else:
            text.append(token)
    assert not text
    return found


def left_out(source: Path) -> dict[str, str]:
    lines = map(json.loads, (source / "left_out.jsonl").read_text().splitlines())
    return {line["name"]: line["cause"] for line in lines}


def test_pictures_with_captions_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    payloads = {
        "a.png": picture(30, 20),
        "b.jpeg": picture(40, 50, "JPEG"),
        "c.webp": picture(8, 9, "WEBP"),
        "sub/d.JPG": picture(16, 17, "JPEG"),
        "sub/e.png": picture(5, 6),
        "wrong.jpg": picture(11, 12, "PNG"),
    }
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    payloads["turned.jpg"] = picture(24, 16, "JPEG", exif=exif)
    broken = picture(64, 64)
    for name, payload in {**payloads, "cut.png": broken[: len(broken) // 2]}.items():
        (folder / name).write_bytes(payload)
    (folder / "none.png").write_bytes(picture(3, 3))
    (folder / "fake.gif").write_text("no picture")
    for name in ("a", "cut", "fake", "wrong"):
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")
    (folder / "b.caption").write_text("<|reserved|> caption of b")
    (folder / "c.json").write_text(json.dumps({"caption": "caption of c", "url": "x"}))
    (folder / "sub/metadata.jsonl").write_text(
        json.dumps({"file_name": "d.JPG", "text": "caption of d"})
        + "\n\n"
        + json.dumps({"file_name": "../a.png", "text": "not its caption"})
    )
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [["file_name", "text"], ["sub/e.png", "caption, of\ne"], ["turned.jpg", "on its side"]]
        )
    summary = build(tmp_path / "corpus", {"images": str(folder)})
    source = tmp_path / "corpus/new"
    found = samples(source)
    assert sorted(found) == ["a", "b", "c", "sub/d", "sub/e", "turned", "wrong"]
    captions = {
        "a": "caption of a",
        "b": "<|reserved|> caption of b",
        "sub/e": "caption, of\ne",
        "sub/d": "caption of d",
    }
    for key, caption in captions.items():
        assert found[key]["txt"].decode() == caption
        assert words(found[key], tmp_path / "corpus/tokenizer.json") == [MARKER, caption, 0]
    for name, payload in payloads.items():
        key = name.partition(".")[0]
        image = Image.open(BytesIO(payload))
        extension = {"JPEG": "jpg"}.get(image.format or "", (image.format or "").lower())
        assert found[key][f"m0.{extension}"] == payload
        size = (16, 24) if key == "turned" else image.size
        [medium] = media_by_key(source)[key]
        assert (medium.width, medium.height) == size
        part = {"img": f"m0.{extension}", "w": size[0], "h": size[1]}
        assert json.loads(found[key]["json"])["seq"][0] == part
    assert left_out(source) == {
        "cut.png": "image cannot be decoded",
        "fake.gif": "image cannot be decoded",
        "none.png": "no caption",
    }
    manifest = Manifest.read(source, key="")
    assert (manifest.media_token_id, manifest.shards[0].images) == (MARKER, 7)
    assert summary.skipped["new: image cannot be decoded"] == 2


def test_videos_are_cut_into_clips_of_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, frames in {"long.mp4": 25, "short.webm": 7, "same.mkv": 10, "cut.avi": 40}.items():
        film(folder / name, frames)
        (folder / f"{Path(name).stem}.txt").write_text(f"film {name}")
    whole = (folder / "cut.avi").read_bytes()
    (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "empty.txt").write_text("nothing")
    build(tmp_path / "corpus", {"videos": str(folder), "clip_seconds": 1.0})
    source = tmp_path / "corpus/new"
    found, media = samples(source), media_by_key(source)
    assert {
        key: [(m.first_frame, m.frames) for m in media[key]] for key in ("long", "same", "short")
    } == {
        "long": [(0, 10), (10, 10), (20, 5)],
        "same": [(0, 10)],
        "short": [(0, 7)],
    }
    assert {(m.kind, m.width, m.height, m.fps) for ms in media.values() for m in ms} == {
        ("video", 64, 48, 10.0)
    }
    assert len({m.member for m in media["long"]}) == 1
    assert [name for name in found["long"] if name.endswith("mp4")] == ["m0.mp4"]
    assert found["long"]["m0.mp4"] == (folder / "long.mp4").read_bytes()
    tokens = words(found["long"], tmp_path / "corpus/tokenizer.json")
    assert tokens == [MARKER, MARKER, MARKER, "film long.mp4", 0]
    assert left_out(source)["empty.mp4"] == "video cannot be decoded"
    assert Manifest.read(source, key="").shards[0].frames == 25 + 7 + 10 + sum(
        m.frames for m in media.get("cut", [])
    )


def test_obelics_documents(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "1.png").write_bytes(picture(10, 11))
    (root / "2.png").write_bytes(picture(12, 13))
    (root / "bad.png").write_bytes(b"bad")
    (tmp_path / "secret.png").write_bytes(picture(1, 1))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"texts": ["one", None, "two", "three"], "images": [None, "1.png", None, None]},
        {"texts": [None, None], "images": ["2.png", "1.png"]},
        {"texts": [None, "after"], "images": ["bad.png", None]},
        {"texts": ["both"], "images": ["1.png"]},
        {"texts": ["longer", None], "images": [None]},
        {"texts": [None, "safe"], "images": ["../secret.png", None]},
        {"texts": [None, "safe"], "images": [str(tmp_path / "secret.png"), None]},
        {"texts": [None, "safe"], "images": ["link.png", None]},
        {"texts": [None, " "], "images": ["missing.png", None]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"obelics": str(tmp_path / "rows.jsonl"), "image_root": str(root)}
    build(tmp_path / "corpus", inputs)
    source, tokenizer = tmp_path / "corpus/new", tmp_path / "corpus/tokenizer.json"
    found = samples(source)
    assert [words(sample, tokenizer) for sample in found.values()] == [
        ["one", MARKER, "two\n\nthree", 0],
        [MARKER, MARKER, 0],
        ["after", 0],
        ["safe", 0],
        ["safe", 0],
        ["safe", 0],
    ]
    assert found["000000001"]["m0.png"] == picture(12, 13)
    assert found["000000001"]["m1.png"] == picture(10, 11)
    assert "txt" not in found["000000001"]
    assert [(m.width, m.place) for m in media_by_key(source)["000000001"]] == [(12, 0), (10, 1)]
    outside = "path outside --image-root"
    assert left_out(source) == {
        "row 2, image 0": "image cannot be decoded",
        "row 3": "texts and images do not alternate",
        "row 4": "texts and images do not alternate",
        "row 5, image 0": outside,
        "row 6, image 0": outside,
        "row 7, image 0": outside,
        "row 8, image 0": "image is missing",
        "row 8": "empty",
    }
    secret = picture(1, 1)
    assert not any(secret in sample.values() for sample in found.values())


def test_pictures_inside_parquet(tmp_path: Path) -> None:
    """As `datasets` stores them: bytes, in a column that it would decode."""
    payloads = [picture(10, 11), picture(12, 13, "JPEG")]
    features = datasets.Features(
        {
            "texts": datasets.List(datasets.Value("string")),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {
        "texts": [[None, "a"], ["b", None, None]],
        "images": [
            [{"bytes": payloads[0], "path": None}, None],
            [None, {"bytes": payloads[1], "path": None}, {"bytes": payloads[0], "path": "x.png"}],
        ],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    build(tmp_path / "corpus", {"obelics": str(tmp_path / "*.parquet")})
    found = samples(tmp_path / "corpus/new")
    assert found["000000000"]["m0.png"] == payloads[0]
    assert (found["000000001"]["m0.jpg"], found["000000001"]["m1.png"]) == (
        payloads[1],
        payloads[0],
    )


def test_mmc4_documents(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(picture(10 + number, 10))
    images = [(2, 1), (1, 0), (3, 1)]
    row: dict[str, Any] = {
        "text_list": ["First.", "Second.", "Third."],
        "image_info": [
            {"image_name": f"{name}.png", "matched_text_index": index, "raw_url": "http://x"}
            for name, index in images
        ],
        "url": "http://x",
    }
    wrong = {**row, "image_info": [{**row["image_info"][0], "matched_text_index": 9}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(wrong) + "\n")
    inputs = {"mmc4": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}
    build(tmp_path / "corpus", inputs)
    source = tmp_path / "corpus/new"
    [sample] = samples(source).values()
    tokens = words(sample, tmp_path / "corpus/tokenizer.json")
    assert tokens == [MARKER, "First.", MARKER, MARKER, "Second. Third.", 0]
    assert [m.width for m in media_by_key(source)["000000000"]] == [11, 12, 13]
    assert left_out(source) == {"row 1": "matched_text_index of no text"}


@pytest.mark.parametrize(
    ("row", "root", "problem"),
    [
        (
            ["http://example.org/a.png"],
            True,
            "http://example.org/a.png: is a URL; download the images",
        ),
        (["a.png"], False, "--image-root: needed for a.png; give the folder it lies in"),
    ],
)
def test_pictures_that_are_elsewhere_are_refused(
    tmp_path: Path, row: list[str], root: bool, problem: str
) -> None:
    rows = [{"texts": ["first"], "images": [None]}, {"texts": [None], "images": row}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"obelics": str(tmp_path / "*.jsonl"), "image_root": str(tmp_path) if root else None}
    with pytest.raises(ValueError, match=problem):
        build(tmp_path / "corpus", inputs)
