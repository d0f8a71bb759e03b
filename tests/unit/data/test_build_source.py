"""Text of folders and tables becomes shards: what goes in, what stays out, and under which keys."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data.build import find_corpus
from data.build_chunks import plan_chunks
from data.importers import drafts
from data.importers.drafts import cut_text, document_key, is_held_out
from data.manifest import Manifest
from data.tokenizer import Vocabulary, read_vocabulary
from tests.unit.data.imports import VOCAB_SIZE, WORDS, build, files, samples, tokenizer_file


def text(i: int) -> str:
    return " ".join(WORDS[i % 7 :] * 3) + f" {i}"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def left_out(source: Path) -> dict[str, str]:
    lines = map(json.loads, (source / "left_out.jsonl").read_text().splitlines())
    return {line["name"]: line["cause"] for line in lines}


def test_files_of_a_folder_become_documents(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub.d/deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.py").write_text(text(1))
    (folder / "a.md").write_text(text(2))
    (folder / "sub.d/deep/b.tar.py").write_text("na\u00efve \u6f22\n")
    (folder / "blank.py").write_text(" \n")
    (folder / "latin.py").write_bytes("na\u00efve".encode("latin-1"))
    (folder / "zero.py").write_bytes(b"a\0b")
    (folder / "other.txt").write_text("not asked for")
    (folder / ".git/config.py").write_text("hidden")
    (folder / "link.py").symlink_to(folder / "a.py")
    summary = build(tmp_path / "corpus", {"text": str(folder), "extensions": ["py", "md"]})
    found = samples(tmp_path / "corpus/new")
    assert {key: sample["txt"].decode() for key, sample in found.items()} == {
        "a-py": text(1),
        "a-md": text(2),
        "sub-d/deep/b-tar-py": "na\u00efve \u6f22\n",
    }
    tokenizer = Tokenizer.from_file(str(tmp_path / "corpus/tokenizer.json"))
    for sample in found.values():
        ids = np.frombuffer(sample["u16"], "<u2")
        assert ids[-1] == 0
        assert (
            tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False).encode() == sample["txt"]
        )
    assert json.loads(found["a-py"]["json"])["title"] == "a.py"
    assert left_out(tmp_path / "corpus/new") == {
        "blank.py": "empty",
        "latin.py": "not UTF-8",
        "zero.py": "binary",
    }
    assert summary.skipped == {"new: binary": 1, "new: empty": 1, "new: not UTF-8": 1}


def test_keys_that_come_again_get_a_number(tmp_path: Path) -> None:
    rows = [
        {"id": name, "text": text(i)} for i, name in enumerate(["x.y", "x-y", "z", "x.y", "z~2"])
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    build(tmp_path / "corpus", {"jsonl": str(tmp_path / "*.jsonl"), "id_key": "id"})
    found = samples(tmp_path / "corpus/new")
    assert {key: sample["txt"].decode() for key, sample in found.items()} == {
        "x-y": text(0),
        "x-y~2": text(1),
        "z": text(2),
        "x-y~3": text(3),
        "z-2": text(4),
    }
    assert json.loads((tmp_path / "corpus/new/import.json").read_text())["renamed"] == 2


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.c/d.e", "a/b-c/d-e"),
        ("/../../etc/passwd", "-/-/etc/passwd"),
        ("__init__.py", "init__-py"),
        ("caf\u00e9 1?", "caf\u00e9-1-"),
        ("...", "-"),
        ("", "document"),
    ],
)
def test_keys_are_what_webdataset_takes(name: str, key: str) -> None:
    assert document_key(name) == key
    assert len(document_key(name + "x" * 1000)) < 200


def test_long_texts_become_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "MAX_CHARACTERS", 100)
    whole = "".join(f"line {i} of the text\n" for i in range(30)) + "x" * 250
    assert "".join(cut_text(whole)) == whole
    assert max(map(len, cut_text(whole))) <= 100
    (tmp_path / "in").mkdir()
    (tmp_path / "in/long.txt").write_text(whole)
    build(tmp_path / "corpus", {"text": str(tmp_path / "in")}, limit=1)
    found = samples(tmp_path / "corpus/new")
    assert list(found)[:2] == ["long-txt", "long-txt+1"]
    assert "".join(sample["txt"].decode() for sample in found.values()) == whole
    assert len({is_held_out(key, 0.5) for key in found}) == 1
    assert json.loads((tmp_path / "corpus/new/import.json").read_text())["cut"] == 1


@pytest.mark.slow
def test_tables_give_the_same_documents(tmp_path: Path) -> None:
    """JSON Lines, packed ones, Parquet, a saved dataset and a folder that `load_dataset` reads."""
    rows: list[dict[str, Any]] = [{"text": text(i), "id": f"d/{i}", "n": i} for i in range(40)]
    rows[7]["text"] = ""
    rows[9]["text"] = None
    (tmp_path / "hub").mkdir()
    for part in (0, 1):
        write_jsonl(tmp_path / f"{part}.jsonl", rows[20 * part : 20 * part + 20])
        with gzip.open(tmp_path / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[20 * part : 20 * part + 20])
        pq.write_table(
            pa.Table.from_pylist(rows[20 * part : 20 * part + 20]), tmp_path / f"{part}.parquet"
        )
    write_jsonl(tmp_path / "hub/train.jsonl", rows)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dictionary")
    inputs = [
        {"jsonl": str(tmp_path / "?.jsonl")},
        {"jsonl": str(tmp_path / "*.gz")},
        {"parquet": str(tmp_path / "*.parquet")},
        {"hf": str(tmp_path / "saved")},
        {"hf": str(tmp_path / "dictionary")},
        {"hf": str(tmp_path / "hub")},
    ]
    for number, one in enumerate(inputs):
        summary = build(
            tmp_path / "corpus", {**one, "id_key": "id"}, source=f"s{number}", held_out=0.3
        )
        assert summary.skipped[f"s{number}: empty"] == 2
        for split in ("train", "validation"):
            found = samples(tmp_path / f"corpus/s{number}" / split)
            expected = {
                row["id"]: row["text"]
                for row in rows
                if row["text"] and is_held_out(row["id"], 0.3) == (split == "validation")
            }
            assert {key: s["txt"].decode() for key, s in found.items()} == expected
    splits = {(split.source, split.split) for split in summary.splits}
    assert len(splits) == 12
    assert find_corpus(tmp_path / "corpus", 280) is not None  # the fingerprint fits


def test_a_tokenizer_is_learnt_from_what_is_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"{i}", "text": text(i)} for i in range(50)]
    kept = [row for row in rows if not is_held_out(row["id"], 0.5)]
    for row in rows:
        if row not in kept:
            row["text"] = "zq" * 200
    write_jsonl(tmp_path / "rows.jsonl", rows)
    inputs = {"jsonl": str(tmp_path / "rows.jsonl"), "id_key": "id"}
    build(tmp_path / "corpus", inputs, held_out=0.5, tokenizer=None, vocab_size=300)
    vocabulary = Tokenizer.from_file(str(tmp_path / "corpus/tokenizer.json")).get_vocab()
    assert len(vocabulary) == 300
    assert "zq" not in vocabulary
    assert "places" in vocabulary or "\u0120places" in vocabulary


def test_rows_and_files_are_limited_and_cut_into_chunks() -> None:
    class Items:
        has_media = False

        def items(self) -> Any:
            return iter([("a", 5), ("b", 6), ("c", 20), ("a", 1), ("d", 1)])

        def drafts(self, start: int, stop: int) -> Any:
            raise NotImplementedError

        def payload(self, reference: str) -> bytes:
            raise NotImplementedError

    plan = plan_chunks(Items(), max_bytes=11, limit=None)
    bounds = [(chunk.start, chunk.stop, chunk.bytes) for chunk in plan.chunks]
    assert bounds == [(0, 2, 11), (2, 3, 20), (3, 5, 2)]
    assert [chunk.again for chunk in plan.chunks] == [(), (), ((3, 2),)]
    limited = plan_chunks(Items(), max_bytes=11, limit=2)
    assert [(chunk.start, chunk.stop) for chunk in limited.chunks] == [(0, 2)]
    assert limited.digest != plan.digest


def test_manifests_name_the_tokenizer_and_hold_no_media(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text(i)} for i in range(30)])
    build(tmp_path / "corpus", {"jsonl": str(tmp_path / "rows.jsonl")})
    manifest = Manifest.read(tmp_path / "corpus/new", key="")
    assert (manifest.split, manifest.samples, manifest.media_token_id) == ("all", 30, None)
    assert (tmp_path / "corpus/tokenizer.json").read_bytes() == tokenizer_file(
        tmp_path
    ).read_bytes()
    assert sorted(samples(tmp_path / "corpus/new"))[3] == "000000003"


def test_tokenizers_of_others(tmp_path: Path) -> None:
    """Their names for the end of a document are known; what they would cut or fill is not."""
    ours = tokenizer_file(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(ours.read_text().replace("<|end|>", "</s>").replace("<|reserved|>", "<image>"))
    loaded = Tokenizer.from_file(str(other))
    loaded.enable_truncation(4)
    loaded.enable_padding(length=2000, pad_id=1)
    loaded.save(str(other))
    assert read_vocabulary(other) == Vocabulary(size=VOCAB_SIZE, end=0, media=2)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text(1) + "</s><image>"}])
    inputs = {"jsonl": str(tmp_path / "rows.jsonl")}
    build(tmp_path / "corpus", inputs, tokenizer=other)
    [sample] = samples(tmp_path / "corpus/new").values()
    ids = np.frombuffer(sample["u16"], "<u2").tolist()
    assert loaded.decode(ids[:-1], skip_special_tokens=False) == text(1) + "</s><image>"
    assert ids[-1] == 0
    assert not {0, 1, 2} & set(ids[:-1])
    other.write_text(ours.read_text().replace("<|end|>", "<|finis|>"))
    with pytest.raises(ValueError, match="none of its special tokens ends a document; add one"):
        read_vocabulary(other)


@pytest.mark.slow
def test_processes_do_not_change_the_bytes(tmp_path: Path) -> None:
    rows = [{"text": text(i) * 100, "id": str(i % 400)} for i in range(500)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    inputs = {"jsonl": str(tmp_path / "rows.jsonl"), "id_key": "id"}
    build(tmp_path / "one", inputs, held_out=0.1)
    build(tmp_path / "two", inputs, held_out=0.1, processes=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(list((tmp_path / "one/new/train").glob("*.tar"))) > 3
    build(tmp_path / "few", inputs, held_out=0.1, shard_megabytes=64)
    build(tmp_path / "inside", inputs, held_out=0.1, shard_megabytes=64, processes=2)
    assert files(tmp_path / "few") == files(tmp_path / "inside")


@pytest.mark.parametrize(
    ("inputs", "options", "problem"),
    [
        ({"text_key": "txt"}, {}, "--text-key=txt: no such column; there is text, n"),
        ({"id_key": "id"}, {}, "--id-key=id: no such column; there is text, n"),
        ({"text_key": "n"}, {}, "--text-key=n: must be a column of text"),
        ({}, {"tokenizer": None}, "--tokenizer: a new corpus needs one; give --tokenizer FILE, or"),
        ({}, {"held_out": 1e-9}, "no document falls to validation"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, inputs: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text(i), "n": i} for i in range(5)])
    with pytest.raises(ValueError, match=problem):
        build(tmp_path / "corpus", {"jsonl": str(tmp_path / "rows.jsonl"), **inputs}, **options)
    assert not (tmp_path / "corpus").exists()


def test_rows_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="cannot be read as json: "):
        build(tmp_path / "corpus", {"jsonl": str(tmp_path / "rows.jsonl")})


def test_another_tokenizer_or_source_of_that_name_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text(i)} for i in range(5)])
    inputs = {"jsonl": str(tmp_path / "rows.jsonl")}
    build(tmp_path / "corpus", inputs)
    before = files(tmp_path / "corpus")
    build(tmp_path / "corpus", inputs)  # there already
    with pytest.raises(ValueError, match=r"--source=new: .* was built from something else"):
        build(tmp_path / "corpus", inputs, limit=3)
    other = tmp_path / "other.json"
    other.write_text(tokenizer_file(tmp_path).read_text() + " ")
    with pytest.raises(ValueError, match=f"--tokenizer={other}: .* is another"):
        build(tmp_path / "corpus", inputs, source="more", tokenizer=other)
    with pytest.raises(ValueError, match=r"--vocab-size=300: .* has 280 tokens; leave the option"):
        build(tmp_path / "corpus", inputs, source="more", tokenizer=None, vocab_size=300)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(ValueError, match="exists and is not a corpus"):
        build(tmp_path / "mine", inputs)
    assert files(tmp_path / "corpus") == before
    assert not list(tmp_path.glob(".*"))
