"""Shards: stock webdataset reads them, equal input gives equal bytes, the fingerprint notices."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data.index import TOKEN_DTYPES, Medium, ShardIndex
from data.manifest import Manifest, corpus_fingerprint
from data.shards import Sample, SampleMedium, write_split

TEXTS = ["plain", "caf\u00e9 \u6f22\u5b57 \U0001f600", "line\nline\n", "x" * 3000]


def samples() -> Iterator[Sample]:
    for i, text in enumerate(TEXTS):
        tokens = np.arange(i + 1, dtype=np.uint32) + 7
        yield Sample(key=f"pkg.v1/mod{i}", metadata={"title": f"T{i}"}, text=text, tokens=tokens)


def write(folder: Path, vocab_size: int = 4096, max_shard_bytes: int = 2**20) -> Manifest:
    return write_split(
        folder,
        samples(),
        source="code",
        split="train",
        tokenizer_sha256="00",
        vocab_size=vocab_size,
        max_shard_bytes=max_shard_bytes,
    )


# webdataset does not close the shards that it reads.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("vocab_size", "extension"), [(4096, "u16"), (129_280, "u32")])
def test_stock_webdataset_yields_the_same_samples(
    tmp_path: Path, vocab_size: int, extension: str
) -> None:
    manifest = write(tmp_path / "train", vocab_size, max_shard_bytes=100)
    shards = [str(tmp_path / "train" / shard.name) for shard in manifest.shards]
    assert len(shards) > 1
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert [sample["txt"] for sample in read] == TEXTS
    for mine, theirs in zip(samples(), read, strict=True):
        assert [name for name in theirs if name[0] != "_"] == ["json", "txt", extension]
        assert theirs["__key__"] == mine.key
        assert theirs["json"] == {"source": "code", **mine.metadata}
        tokens = np.frombuffer(theirs[extension], TOKEN_DTYPES[extension])
        np.testing.assert_array_equal(tokens, mine.tokens)


MARKER = 2


def picture_book() -> Sample:
    """Text, an image, text, a clip."""
    media = (
        SampleMedium(extension="jpg", payload=b"image", kind="image", width=40, height=30),
        SampleMedium(
            extension="mp4",
            payload=b"clip",
            kind="video",
            width=8,
            height=6,
            frames=5,
            fps=12.5,
            first_frame=3,
        ),
    )
    parts = [{"t": "one"}, media[0].part(0), {"t": "two"}, media[1].part(1)]
    return Sample(
        key="book/1",
        metadata={"v": 1, "kind": "interleaved", "seq": parts},
        text="onetwo",
        tokens=np.array([7, MARKER, 8, 9, MARKER, 0], np.uint16),
        media=media,
    )


def write_book(folder: Path, sample: Sample, media_token_id: int | None = MARKER) -> Manifest:
    return write_split(
        folder,
        [next(samples()), sample],
        source="books",
        split="all",
        tokenizer_sha256="00",
        vocab_size=16,
        media_token_id=media_token_id,
    )


def test_media_are_found_through_the_index(tmp_path: Path) -> None:
    manifest = write_book(tmp_path / "books", picture_book())
    [entry] = manifest.shards
    assert (manifest.split, manifest.media_token_id, entry.samples) == ("all", MARKER, 2)
    assert (entry.images, entry.videos, entry.frames) == (1, 1, 5)
    assert entry.pixels == 40 * 30 + 5 * 8 * 6
    assert Manifest.read(tmp_path / "books", key="k") == manifest
    tar = tmp_path / "books" / entry.name
    index = ShardIndex.open(tar)
    raw = tar.read_bytes()
    assert [index.member_name(member) for member in index.members(1)] == [
        f"book/1.{extension}" for extension in ("json", "m0.jpg", "m1.mp4", "txt", "u16")
    ]
    image, clip = index.media(1)
    assert image == Medium(member=4, place=1, kind="image", width=40, height=30)
    assert clip == Medium(
        member=5, place=4, kind="video", width=8, height=6, frames=5, fps=12.5, first_frame=3
    )
    for medium, payload in ((image, b"image"), (clip, b"clip")):
        offset, size = int(index.offset[medium.member]), int(index.size[medium.member])
        assert raw[offset : offset + size] == payload
    assert index.media(0) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"media": ()}, "must list its media"),
        ({"metadata": {}}, "must list its media"),
        ({"tokens": np.array([7, MARKER, 0], np.uint16)}, "1 markers among its tokens for 2 media"),
    ],
)
def test_media_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"key book/1: .*{problem}"):
        write_book(tmp_path / "books", replace(picture_book(), **changes))
    with pytest.raises(ValueError, match="key book/1: has media; give"):
        write_book(tmp_path / "other", picture_book(), media_token_id=None)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_members_have_headers_of_one_block(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    with tarfile.open(tmp_path / "a" / manifest.shards[0].name) as archive:
        assert [info.offset_data - info.offset for info in archive] == [512] * 12


def test_manifest_reads_back_and_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path / "train")
    assert Manifest.read(tmp_path / "train", key="k") == manifest
    assert (manifest.samples, manifest.tokens) == (4, 1 + 2 + 3 + 4)


def test_manifest_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^some\.key: there is no /.*manifest.json; build it with"
    ):
        Manifest.read(tmp_path, key="some.key")
    whole = write(tmp_path / "train")
    path = tmp_path / "train" / "manifest.json"
    plain = json.loads(path.read_text())
    plain["shards"][0]["name"] = "../other.tar"
    for text, problem in (
        ('{"version": 1}', "of version 1, not 2"),
        ('{"version": 2}', "shards"),
        ("[]", "pop"),
        ("{", "Expecting"),
        (json.dumps(plain), "names a shard in another folder"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"some\.key: .*{problem}.*; remove the corpus and"):
            Manifest.read(tmp_path / "train", key="some.key")
    whole.write(tmp_path / "train")
    assert Manifest.read(tmp_path / "train", key="some.key") == whole


def test_no_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documents"):
        write_split(
            tmp_path / "x", [], source="s", split="train", tokenizer_sha256="", vocab_size=9
        )


def test_fingerprint_depends_on_names_shards_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    for split in ("train", "validation"):
        write(tmp_path / "code" / split)
    first = corpus_fingerprint({"code": tmp_path / "code"}, tokenizer)
    assert corpus_fingerprint({"code": tmp_path / "code"}, tokenizer) == first
    assert corpus_fingerprint({"text": tmp_path / "code"}, tokenizer) != first
    tokenizer.write_text("{ }")
    second = corpus_fingerprint({"code": tmp_path / "code"}, tokenizer)
    manifest = tmp_path / "code" / "validation" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 10', '"tokens": 11'))
    third = corpus_fingerprint({"code": tmp_path / "code"}, tokenizer)
    assert len({first, second, third}) == 3
    with pytest.raises(ValueError, match=r"data\.tokenizer: there is no /.*none.json"):
        corpus_fingerprint({"code": tmp_path / "code"}, tmp_path / "none.json")
