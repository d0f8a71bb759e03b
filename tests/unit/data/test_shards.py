"""Shards: stock webdataset reads them, equal input gives equal bytes, the fingerprint notices."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.index import TOKEN_DTYPES
from data.shards import Manifest, Sample, corpus_fingerprint, write_split

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


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_manifest_reads_back_and_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path / "train")
    assert Manifest.read(tmp_path / "train", key="k") == manifest
    assert (manifest.samples, manifest.tokens) == (4, 1 + 2 + 3 + 4)


def test_manifest_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^some\.key: there is no /.*manifest.json; build it with"
    ):
        Manifest.read(tmp_path, key="some.key")
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="not a manifest of version 1"):
        Manifest.read(tmp_path, key="some.key")


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
