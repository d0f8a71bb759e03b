"""Indexing shards that others wrote: right contents, nothing unpickled, nothing lost in silence."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer

import data.foreign
import data.processes
from data.foreign import format_report, index_folder, read_report
from data.index import ShardIndex, index_path, tokens_path
from data.manifest import Manifest
from data.tars import CorruptShardError, TarMember, read_samples
from data.tokenizer import train_tokenizer
from data.verify import verify
from tests.unit.data.media_samples import clip, image

END, MARKER = 0, 2
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "went",
    "to",
    "other",
    "places",
    "with",
    "a",
    "dog",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [" ".join(WORDS[i % 7 :] * 3) for i in range(20)]
    train_tokenizer(texts, 270, progress=False).save(str(path))
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))


def webdataset_shard(path: Path, samples: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def index(folder: Path, tokenizer: Path) -> Manifest:
    return index_folder(folder, tokenizer=tokenizer, source="theirs", progress=False)


def stored(tar: Path, sample: int) -> list[int]:
    found = ShardIndex.open(tar)
    raw = tokens_path(tar).read_bytes()[int(found.token_offset[sample]) :]
    return [int(i) for i in np.frombuffer(raw, found.token_dtype, int(found.num_tokens[sample]))]


def texts(tar: Path, sample: int, tokenizer: Path) -> list[str]:
    """The decoded document, cut at its markers."""
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = stored(tar, sample)
    assert ids[-1] == END
    cuts = [i for i, token in enumerate(ids) if token == MARKER]
    pieces = [
        ids[start:stop]
        for start, stop in zip([0, *(c + 1 for c in cuts)], [*cuts, -1], strict=True)
    ]
    return [loaded.decode(piece, skip_special_tokens=False) for piece in pieces]


def test_captions_come_after_their_images(tmp_path: Path, tokenizer: Path) -> None:
    """As img2dataset writes them; the tar is left as it is."""
    tar = tmp_path / "theirs" / "00000.tar"
    payload = image(30, 20)
    webdataset_shard(
        tar,
        [
            {"__key__": "000000", "jpg": payload, "txt": "a cat", "json": {"caption": "no"}},
            {"__key__": "000001", "png": image(9, 8, form="PNG"), "json": {"caption": "a mat"}},
            {"__key__": "000002", "caption": "only text <|end|> <|reserved|>"},
            {"__key__": "000003", "webp": image(7, 5, form="WEBP")},
            {"__key__": "000004", "json": {"text": "in JSON", "caption": "no"}, "cls": 3},
        ],
    )
    before = tar.read_bytes()
    manifest = index(tar.parent, tokenizer)
    assert tar.read_bytes() == before
    assert Manifest.read(tar.parent, key="k") == manifest
    assert (manifest.source, manifest.split, manifest.media_token_id) == ("theirs", "all", MARKER)
    assert (manifest.samples, manifest.vocab_size) == (5, 270)
    assert [texts(tar, i, tokenizer) for i in range(5)] == [
        ["", "a cat"],
        ["", "a mat"],
        ["only text <|end|> <|reserved|>"],
        ["", ""],
        ["in JSON"],
    ]
    found = ShardIndex.open(tar)
    [medium] = found.media(0)
    assert (medium.kind, medium.width, medium.height, medium.place) == ("image", 30, 20, 0)
    start, size = int(found.offset[medium.member]), int(found.size[medium.member])
    assert before[start : start + size] == payload
    assert read_report(tar.parent).ignored == {"cls": 1}
    assert verify(tar.parent, decode=True, progress=False) == []


def test_interleaved_documents_and_parts_of_clips(tmp_path: Path, tokenizer: Path) -> None:
    tar = tmp_path / "theirs" / "x.tar"
    seq = [
        {"t": "one"},
        {"vid": "clip.mp4", "start": 2, "n": 3},
        {"t": "two"},
        {"img": "0.jpg", "w": 999},
        {"vid": "clip.mp4"},
        {"t": "three"},
    ]
    write_tar(
        tar,
        [
            ("a/b.0.jpg", image(30, 20)),
            ("a/b.1.jpg", image(3, 2)),
            ("a/b.clip.mp4", clip(32, 16, frames=6, fps=5)),
            ("a/b.json", json.dumps({"seq": seq}).encode()),
        ],
    )
    manifest = index(tar.parent, tokenizer)
    assert texts(tar, 0, tokenizer) == ["one", "two", "", "three"]
    part, picture, whole = ShardIndex.open(tar).media(0)
    assert (part.kind, part.first_frame, part.frames, part.fps) == ("video", 2, 3, 5.0)
    assert (picture.width, picture.height, picture.frames) == (30, 20, 1)
    assert (whole.first_frame, whole.frames, whole.member) == (0, 6, part.member)
    ids = stored(tar, 0)
    assert [ids[m.place] for m in (part, picture, whole)] == [MARKER] * 3
    [entry] = manifest.shards
    assert (entry.images, entry.videos, entry.frames) == (1, 2, 9)
    assert entry.pixels == 30 * 20 + 9 * 32 * 16
    assert read_report(tar.parent).ignored == {"1.jpg": 1}


def test_text_alone_needs_no_marker(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "theirs"
    for shard in range(3):
        webdataset_shard(
            folder / f"{shard}.tar",
            [{"__key__": f"k{shard}{i}", "txt": " ".join(WORDS[: i + 1])} for i in range(4)],
        )
    manifest = index(folder, tokenizer)
    assert (manifest.media_token_id, manifest.samples) == (None, 12)
    assert [shard.name for shard in manifest.shards] == ["0.tar", "1.tar", "2.tar"]
    for document in range(12):
        tar = folder / f"{document // 4}.tar"
        assert ShardIndex.open(tar).key(document % 4) == f"k{document // 4}{document % 4}"
        assert texts(tar, document % 4, tokenizer) == [" ".join(WORDS[: document % 4 + 1])]


BAD_SEQ = json.dumps({"seq": [{"img": "7.jpg"}]}).encode()
BAD_FRAMES = json.dumps({"seq": [{"vid": "mp4", "start": 3, "n": 9}]}).encode()
UNUSABLE = {
    "no text and no medium": [("a.cls", b"3")],
    "image cannot be read": [("a.jpg", b"nothing"), ("a.txt", b"text")],
    "video cannot be read": [("a.mp4", b"#EXTM3U\n/etc/hostname\n"), ("a.txt", b"text")],
    "text is not UTF-8": [("a.txt", b"\xff\xfe")],
    "JSON cannot be read": [("a.json", b"{"), ("a.txt", b"text")],
    "seq names a medium that is not there": [("a.json", BAD_SEQ)],
    "seq names frames that the clip has not": [("a.json", BAD_FRAMES), ("a.mp4", b"CLIP")],
    "seq is no list of texts and media": [("a.json", b'{"seq": 3}')],
    "two members of the same name": [("a.txt", b"one"), ("a.txt", b"two")],
}


@pytest.mark.parametrize("cause", UNUSABLE)
def test_what_cannot_be_used_is_left_out_and_listed(
    tmp_path: Path, tokenizer: Path, cause: str
) -> None:
    mp4 = clip(16, 16, frames=6, fps=5)
    bad = [(name, mp4 if payload == b"CLIP" else payload) for name, payload in UNUSABLE[cause]]
    good = [("b.txt", b"good")]
    write_tar(tmp_path / "theirs" / "x.tar", [*good, *bad, ("c.txt", b"good")])
    manifest = index(tmp_path / "theirs", tokenizer)
    assert manifest.samples == 2
    report = read_report(tmp_path / "theirs")
    assert [(one.shard, one.key, one.cause) for one in report.left_out] == [("x.tar", "a", cause)]
    assert f"left out: 1 samples, {cause}" in format_report(manifest, report)
    assert verify(tmp_path / "theirs", decode=True, progress=False) == []


def test_halves_of_characters_and_repeated_keys_are_left_out(
    tmp_path: Path, tokenizer: Path
) -> None:
    members = [("a.txt", b"1"), ("b.json", b'{"text": "\\ud800"}'), ("a.txt", b"2")]
    write_tar(tmp_path / "theirs" / "x.tar", members)
    index(tmp_path / "theirs", tokenizer)
    causes = [one.cause for one in read_report(tmp_path / "theirs").left_out]
    assert causes == ["text is not UTF-8", "key comes twice"]


class Bomb:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_names_are_no_paths_and_nothing_is_unpickled(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "theirs"
    folder.parent.mkdir()
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = ["../../escaped", "/tmp/mneme-absolute", "a/../../b", "..", "plain"]
    bomb = pickle.dumps(Bomb())
    members = [
        (f"{name}.{extension}", payload)
        for name in names
        for extension, payload in (("pickle", bomb), ("pyd", bomb), ("pth", bomb), ("txt", b"t"))
    ]
    write_tar(folder / "x.tar", members)
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith("x.tar")}
    manifest = index(folder, tokenizer)
    assert verify(folder, decode=True, progress=False) == []
    after = {path for path in tmp_path.rglob("*") if not path.name.startswith("x.tar")}
    assert after - before == {folder / "manifest.json"}
    assert not Path("/tmp/mneme-absolute.txt").exists()
    found = ShardIndex.open(folder / "x.tar")
    keys = [found.key(i) for i in range(len(found))]
    assert [key for key in keys if key in names] == [
        "../../escaped",
        "/tmp/mneme-absolute",
        "a/../../b",
        "plain",
    ]
    assert manifest.samples == len(keys)


def test_folders_links_and_nameless_members_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "theirs" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind, payload in (
            ("a", tarfile.DIRTYPE, b""),
            ("a/1.txt", tarfile.REGTYPE, b"one"),
            ("a/link.txt", tarfile.SYMTYPE, b""),
            ("a/.hidden", tarfile.REGTYPE, b"x" * 600),
            ("README", tarfile.REGTYPE, b"x"),
            ("a/2.txt", tarfile.REGTYPE, b"two"),
            ("dev.txt", tarfile.CHRTYPE, b""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(payload), "/etc/hostname"
            archive.addfile(info, io.BytesIO(payload))
    assert index(path.parent, tokenizer).samples == 2
    assert read_report(path.parent).ignored == {
        "folder": 1,
        "name without a key or an extension": 2,
        "no plain file": 2,
    }
    assert verify(path.parent, progress=False) == []


def three_shards(folder: Path) -> list[Path]:
    tars = [folder / f"{i}.tar" for i in range(3)]
    for i, tar in enumerate(tars):
        write_tar(tar, [(f"{i}{j}.txt", f"text {j}".encode()) for j in range(5)])
    return tars


def test_finished_shards_are_not_read_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = three_shards(tmp_path / "theirs")
    manifest = index(tars[0].parent, tokenizer)
    read: list[str] = []

    def counted(tar: Path, ignored: Counter[str]) -> Iterator[list[TarMember]]:
        read.append(tar.name)
        return read_samples(tar, ignored)

    monkeypatch.setattr(data.foreign, "read_samples", counted)
    assert index(tars[0].parent, tokenizer) == manifest
    assert read == []
    tokens_path(tars[0]).unlink()
    index_path(tars[1]).write_bytes(index_path(tars[2]).read_bytes())
    assert index(tars[0].parent, tokenizer) == manifest
    assert read == ["0.tar", "1.tar"]
    read.clear()
    write_tar(tars[2], [("new.txt", b"other text")])
    assert index(tars[0].parent, tokenizer).samples == 11
    assert read == ["2.tar"]
    read.clear()
    other = tmp_path / "other.json"
    other.write_text(tokenizer.read_text() + "\n")
    index(tars[0].parent, other)
    assert read == ["0.tar", "1.tar", "2.tar"]


def test_damaged_shards_are_named_and_the_others_indexed(tmp_path: Path, tokenizer: Path) -> None:
    tars = three_shards(tmp_path / "theirs")
    whole = tars[1].read_bytes()
    os.truncate(tars[0], 1500)
    os.truncate(tars[1], 1024)  # between two members
    with pytest.raises(CorruptShardError) as caught:
        index(tars[0].parent, tokenizer)
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[:2]] == [str(tars[0]), str(tars[1])]
    assert lines[2].startswith("1 of 3 shards are indexed; restore these")
    assert not (tars[0].parent / "manifest.json").exists()
    tars[1].write_bytes(whole)
    tars[0].unlink()
    assert index(tars[1].parent, tokenizer).samples == 10


def test_what_is_refused_says_what_to_type(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "theirs"
    with pytest.raises(ValueError, match="is no folder"):
        index(folder, tokenizer)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"has no shards NAME.tar"):
        index(folder, tokenizer)
    with tarfile.open(folder / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"a.tar.gz: is compressed.*unpack"):
        index(folder, tokenizer)
    shutil.move(folder / "a.tar.gz", folder / "a.tar")
    with pytest.raises(ValueError, match=r"a.tar: is compressed.*unpack"):
        index(folder, tokenizer)
    write_tar(folder / "a.tar", [("a.cls", b"1")])
    with pytest.raises(ValueError, match=r"no sample can be used: {'no text and no medium': 1}"):
        index(folder, tokenizer)
    shutil.rmtree(folder)
    write_tar(folder / "a.tar", [("a.txt", b"1")])
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"was not written by `mneme data index`"):
        index(folder, tokenizer)


def test_media_need_a_token_to_mark_them(tmp_path: Path, tokenizer: Path) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text(tokenizer.read_text().replace("<|reserved|>", "<|other|>"))
    folder = tmp_path / "theirs"
    write_tar(folder / "x.tar", [("a.txt", b"text")])
    assert index(folder, plain).samples == 1
    write_tar(folder / "x.tar", [("a.jpg", image(4, 4)), ("a.txt", b"text")])
    with pytest.raises(ValueError, match=r"has no token to mark them; add .* <\|reserved\|>"):
        index(folder, plain)


@pytest.mark.slow
def test_processes_index_the_same(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, spread = three_shards(tmp_path / "a"), three_shards(tmp_path / "b")
    expected = index(alone[0].parent, tokenizer)
    monkeypatch.setattr(data.processes, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert index(spread[0].parent, tokenizer) == expected
    for one, other in zip(alone, spread, strict=True):
        assert index_path(one).read_bytes() == index_path(other).read_bytes()
