"""Whatever is damaged, verify names it, and nothing that is whole."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.processes
from data.foreign import index_folder
from data.index import index_path, tokens_path
from data.manifest import MANIFEST_NAME, Manifest, corpus_fingerprint
from data.shards import Sample, SampleMedium, write_split
from data.tokenizer import train_tokenizer
from data.verify import Problem, format_problems, plain_problems, verify
from tests.unit.data.media_samples import clip, image

MARKER = 2
SAMPLES = 24


def document(number: int, *, broken_image: bool = False) -> Sample:
    """Every third has an image, every sixth a clip, too."""
    media: list[SampleMedium] = []
    if number % 3 == 0:
        payload = image(20, 10 + number, seed=number)
        payload = payload[: len(payload) // 2] if broken_image else payload
        medium = SampleMedium(
            extension="jpg", payload=payload, kind="image", width=20, height=10 + number
        )
        media.append(medium)
    if number % 6 == 0:
        medium = SampleMedium(
            extension="mp4",
            payload=clip(32, 16, frames=3, fps=5),
            kind="video",
            width=32,
            height=16,
            frames=3,
            fps=5.0,
        )
        media.append(medium)
    parts = [{"t": f"text {number}"}, *(m.part(i) for i, m in enumerate(media))]
    return Sample(
        key=f"book/{number:03d}",
        metadata={"seq": parts},
        text=f"text {number}",
        tokens=np.array([5, 6, *[MARKER] * len(media), 0], np.uint16),
        media=tuple(media),
    )


def write(folder: Path, *, split: str = "train", broken: int = -1) -> Manifest:
    return write_split(
        folder,
        [document(i, broken_image=i == broken) for i in range(SAMPLES)],
        source="books",
        split=split,
        tokenizer_sha256="00",
        vocab_size=16,
        media_token_id=MARKER,
        max_shard_bytes=6_000,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "books"
    assert len(write(folder, split="all").shards) >= 3
    return folder


@pytest.fixture
def books(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "books"))


def found(folder: Path, *, decode: bool = False) -> list[tuple[str, str, str]]:
    problems = verify(folder, decode=decode, progress=False)
    assert plain_problems(problems)["ok"] is (not problems)
    return [(p.shard, p.key, p.problem) for p in problems]


def members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as archive:
        return archive.getmembers()


def keys(infos: list[tarfile.TarInfo]) -> list[str]:
    return list(dict.fromkeys(info.name.partition(".")[0] for info in infos))


def overwrite(path: Path, offset: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(new)


FIRST = "shard-000000.tar"


def test_whole_shards_have_no_problem(books: Path) -> None:
    assert verify(books, decode=True, progress=False) == []
    assert plain_problems([]) == {"ok": True, "problems": []}


def test_cut_inside_a_member_names_every_lost_sample(books: Path) -> None:
    tar = books / FIRST
    size = tar.stat().st_size
    infos = members(tar)
    at = infos[7].offset_data + 1
    lost = keys([info for info in infos if info.offset_data + info.size > at])
    os.truncate(tar, at)
    problems = found(books)
    assert (FIRST, "", f"has {at} bytes, but {size} were written") in problems
    assert [key for _, key, text in problems if "is cut off: the shard ends" in text] == lost
    assert len(problems) == 1 + len(lost)


def test_cut_between_two_members_names_every_lost_sample(books: Path) -> None:
    """Where stock readers see the end of a whole archive."""
    tar = books / FIRST
    infos = members(tar)
    first = next(info for info in infos if info.name.startswith("book/003."))
    os.truncate(tar, first.offset)
    with tarfile.open(tar) as archive:
        assert len(archive.getnames()) < len(infos)  # no error
    lost = keys([info for info in infos if info.offset >= first.offset])
    assert [key for _, key, _ in found(books)] == ["", *lost]


def test_damaged_header_names_its_sample(books: Path) -> None:
    tar = books / FIRST
    victim = members(tar)[5]
    overwrite(tar, victim.offset, b"\xff" * 512)
    key, _, extension = victim.name.partition(".")
    text = f"header of {extension} is damaged: stock readers stop before it"
    assert found(books) == [(FIRST, key, text)]


def test_header_that_names_another_file_is_found(books: Path) -> None:
    """Its checksum is right: only the index knows."""
    tar = books / FIRST
    victim = members(tar)[5]
    victim.name = victim.name.replace("book/", "boot/")
    overwrite(tar, victim.offset, victim.tobuf(tarfile.USTAR_FORMAT))
    [(_, key, text)] = found(books)
    assert key == victim.name.replace("boot/", "book/").partition(".")[0]
    assert text.startswith("header of")


@pytest.mark.parametrize("extension", ["json", "m0.jpg", "txt", "u16"])
def test_damaged_payload_names_its_sample(books: Path, extension: str) -> None:
    tar = books / FIRST
    victims = [info for info in members(tar) if info.name.endswith("." + extension)]
    for victim in (victims[0], victims[-1]):
        overwrite(tar, victim.offset_data + victim.size // 2, b"\xee")
    text = f"{extension} is not what was written (CRC-32)"
    wanted = keys([victims[0], victims[-1]])
    assert found(books) == [(FIRST, key, text) for key in wanted]


def test_byte_that_no_sample_has_is_found(books: Path) -> None:
    tar = books / FIRST
    victim = members(tar)[0]
    overwrite(tar, victim.offset_data + victim.size, b"x")  # padding
    assert found(books) == [(FIRST, "", "its SHA-256 is not the one in the manifest")]
    overwrite(tar, victim.offset_data + victim.size, b"\0")
    overwrite(tar, tar.stat().st_size - 9, b"x")
    [(_, key, text)] = found(books)
    assert (key, text[:18]) == ("", "the end is damaged")


def test_missing_and_empty_shards(books: Path) -> None:
    size = (books / FIRST).stat().st_size
    (books / FIRST).write_bytes(b"")
    (books / "shard-000001.tar").unlink()
    problems = found(books)
    assert problems == [
        (FIRST, "", f"is empty, but {size} bytes were written"),
        ("shard-000001.tar", "", "is missing"),
    ]


def test_wrong_missing_and_foreign_indexes(books: Path) -> None:
    first, second = (index_path(books / f"shard-00000{i}.tar") for i in (0, 1))
    shutil.copy(second, first)
    second.unlink()
    shutil.copy(books / FIRST, books / "more.tar")
    text = "is not the index in the manifest (SHA-256): samples of its shard were not compared"
    assert found(books) == [
        ("more.tar", "", "is not in the manifest: nothing reads it"),
        (first.name, "", text),
        (second.name, "", "is missing"),
    ]
    overwrite(books / FIRST, 700, b"x")
    assert (FIRST, "", "its SHA-256 is not the one in the manifest") in found(books)


def test_all_faults_at_once(books: Path) -> None:
    """None hides another."""
    last = Manifest.read(books, key="k").shards[-1].name
    infos = members(books / FIRST)
    overwrite(books / FIRST, infos[2].offset_data, b"\xee")
    overwrite(books / FIRST, infos[9].offset, b"\xff" * 512)
    overwrite(books / FIRST, infos[-1].offset_data, b"\xee")
    (books / "shard-000001.tar").unlink()
    os.truncate(books / last, members(books / last)[-1].offset)
    hit = keys([infos[2]]) + keys([infos[9]]) + keys([infos[-1]])
    problems = [(shard, key) for shard, key, _ in found(books)]
    assert problems[: len(hit)] == [(FIRST, key) for key in hit]
    assert ("shard-000001.tar", "") in problems
    assert problems[-2][0] == problems[-1][0] == last
    assert len(problems) == len(hit) + 1 + 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.__setitem__("vocab_size", 6), "token id 6 is not below the vocabulary of 6"),
        (lambda m: m.__setitem__("media_token_id", 9), r"media are marked at tokens \[\], but"),
        (lambda m: m["shards"][0].__setitem__("tokens", 1), "the manifest lists {.*'tokens': 1,"),
        (lambda m: m.__setitem__("version", 1), "of version 1, not 2"),
    ],
)
def test_manifest_that_does_not_fit(
    books: Path, change: Callable[[dict[str, object]], None], problem: str
) -> None:
    manifest = json.loads((books / MANIFEST_NAME).read_text())
    change(manifest)
    (books / MANIFEST_NAME).write_text(json.dumps(manifest))
    problems = found(books)
    assert problems
    for _, _, text in problems:
        assert re.search(problem, text)


def test_media_are_decoded_if_asked_for(tmp_path: Path) -> None:
    """A file that was broken before it was stored has the right checksum."""
    write(tmp_path / "books", split="all", broken=3)
    assert found(tmp_path / "books") == []
    [(_, key, text)] = found(tmp_path / "books", decode=True)
    assert key == "book/003"
    assert text.startswith("m0.jpg cannot be decoded: ")


def test_corpus_with_a_missing_split_and_another_tokenizer(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for split in ("train", "validation"):
        write(corpus / "books" / split, split=split)
    write(corpus / "loose", split="all")
    (corpus / "tokenizer.json").write_text("{}")
    fingerprint = corpus_fingerprint(
        {name: corpus / name for name in ("books", "loose")}, corpus / "tokenizer.json"
    )
    splits = [("books", "train"), ("books", "validation"), ("loose", "all")]
    summary = {
        "fingerprint": fingerprint,
        "splits": [{"source": source, "split": split} for source, split in splits],
    }
    (corpus / "corpus.json").write_text(json.dumps(summary))
    other = [p for p in verify(corpus, progress=False) if "token ids are not of" not in p.problem]
    assert other == []
    assert len(verify(corpus, progress=False)) == 3  # "00" is the hash of no file
    assert found(corpus / "books" / "train") != []
    (corpus / "books" / "validation" / MANIFEST_NAME).unlink()
    (corpus / "loose" / MANIFEST_NAME).unlink()
    texts = [(p.source, p.problem) for p in verify(corpus, progress=False)]
    assert ("books", "split validation has no manifest") in texts
    assert ("loose", "split all has no manifest") in texts
    overwrite(corpus / "books" / "train" / FIRST, 520, b"x")
    assert any(p.key == "book/000" for p in verify(corpus, progress=False))


def test_nothing_to_verify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest.json, nor have its folders; give"):
        verify(tmp_path, progress=False)


@pytest.mark.slow
def test_processes_find_the_same(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overwrite(books / FIRST, 512, b"\xee")
    (books / "shard-000001.tar").unlink()
    alone = verify(books, progress=False)
    monkeypatch.setattr(data.processes, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert verify(books, progress=False) == alone


def test_names_cannot_write_to_the_terminal() -> None:
    problem = Problem("s", "x.tar", "\x1b[2J\nkey \u6f22", "is damaged", "restore it")
    text = format_problems([problem])
    assert "key \\x1b[2J\\nkey \u6f22: is damaged; restore it" in text
    assert plain_problems([problem])["problems"][0]["key"] == problem.key


def test_token_files_beside_the_shards_are_checked(tmp_path: Path) -> None:
    """Of shards that others wrote."""
    tokenizer = tmp_path / "tokenizer.json"
    texts = [f"the number {i} and more words" for i in range(12)]
    train_tokenizer(texts, 265, progress=False).save(str(tokenizer))
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for i in range(3):
                info = tarfile.TarInfo(f"{shard}{i}.txt")
                info.size = len(texts[i])
                archive.addfile(info, io.BytesIO(texts[i].encode()))
    index_folder(folder, tokenizer=tokenizer, source="theirs", progress=False)
    assert found(folder) == []
    paths = [tokens_path(folder / f"{shard}.tar") for shard in range(4)]
    size = paths[0].stat().st_size
    overwrite(paths[0], size - 2, b"\xee")
    os.truncate(paths[1], size // 2)
    paths[2].write_bytes(b"")
    paths[3].unlink()
    problems = found(folder)
    assert problems[0] == ("0.tar.tokens", "02", "token ids are not what was written (CRC-32)")
    names = [(name, key) for name, key, _ in problems]
    assert names[1:4] == [("1.tar.tokens", key) for key in ("", "11", "12")]
    assert names[4:8] == [("2.tar.tokens", key) for key in ("", "20", "21", "22")]
    assert problems[8:] == [("3.tar.tokens", "", "is missing")]
