"""Building a corpus: whole or not at all, the same twice, and encoded as it says."""

import os
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import data.build
from data.build import build_corpus, build_quickstart_corpus, find_corpus
from data.config import DataConfig, SourceConfig
from data.corpus import Document
from data.loader import build_loader, fingerprint
from data.reader import SplitReader
from data.tokenizer import encode, train_tokenizer

VOCAB_SIZE = 280
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "went", "to", "other", "places"]


def documents(number: int) -> list[Document]:
    """Different texts, in falling order of keys."""
    return [
        Document(f"pkg/{i:03d}", " ".join(WORDS[i % 7 :] * (i + 3)) + str(i), f"title {i}")
        for i in reversed(range(number))
    ]


def build(destination: Path) -> data.build.CorpusSummary:
    return build_corpus(
        destination,
        {"code": documents(20), "docs": documents(9)},
        vocab_size=VOCAB_SIZE,
        skipped=Counter({"too short": 2}),
        progress=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_build_is_complete_and_repeatable(tmp_path: Path) -> None:
    summary = build(tmp_path / "a")
    again = build(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert replace(again, destination=summary.destination) == summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing left over
    counts = {(s.source, s.split): s.documents for s in summary.splits}
    assert counts["code", "train"] + counts["code", "validation"] == 20
    assert counts["code", "validation"] == 5
    assert counts["docs", "validation"] == 2


def test_stored_tokens_decode_to_the_text(tmp_path: Path) -> None:
    build(tmp_path / "corpus")
    tokenizer = Tokenizer.from_file(str(tmp_path / "corpus/tokenizer.json"))
    expected = {d.text for d in documents(20)}
    found = set()
    for split in ("train", "validation"):
        reader = SplitReader(tmp_path / "corpus/code", source="code", split=split)
        for document in range(len(reader)):
            ids = reader.stored_tokens(document).tolist()
            assert ids[-1] == 0
            assert ids.count(0) == 1
            found.add(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    assert found == expected


def test_built_corpus_loads_and_has_the_announced_fingerprint(tmp_path: Path) -> None:
    summary = build(tmp_path / "corpus")
    config = DataConfig(
        sources={n: SourceConfig(path=str(tmp_path / "corpus" / n)) for n in ("code", "docs")},
        tokenizer=str(tmp_path / "corpus/tokenizer.json"),
        sequence_length=32,
        prefetch_batches=0,
    )
    assert fingerprint(config) == summary.fingerprint
    loader = build_loader(
        config, split="train", seed=0, global_batch_size=4, data_rank=0, data_size=1
    )
    for batch, _ in islice(loader, 20):
        assert int(batch.input_ids.max()) < VOCAB_SIZE


def test_second_call_returns_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "corpus"
    summary = build(destination)
    before = files(destination)
    monkeypatch.setattr(data.build, "build_corpus", None)
    found = build_quickstart_corpus(destination, vocab_size=VOCAB_SIZE, progress=False)
    assert found == summary
    assert files(destination) == before


def test_what_is_not_this_corpus_is_refused(tmp_path: Path) -> None:
    assert find_corpus(tmp_path / "missing", VOCAB_SIZE) is None
    assert find_corpus(tmp_path, VOCAB_SIZE) is None
    build(tmp_path / "corpus")
    with pytest.raises(ValueError, match=rf"{tmp_path}: exists and is not a corpus; remove it"):
        find_corpus(tmp_path, VOCAB_SIZE)
    with pytest.raises(ValueError, match="holds a corpus with vocab_size=280, not 4096"):
        find_corpus(tmp_path / "corpus", 4096)
    tokenizer = tmp_path / "corpus/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(ValueError, match="changed since it was built"):
        find_corpus(tmp_path / "corpus", VOCAB_SIZE)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.build, "summarize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_equal_texts_are_kept_once(tmp_path: Path) -> None:
    twins = [Document(f"twin{i}", "the same text " * 20, "") for i in range(3)]
    summary = build_corpus(
        tmp_path / "corpus",
        {"code": [*twins, *documents(8)]},
        vocab_size=VOCAB_SIZE,
        skipped=Counter(),
        progress=False,
    )
    assert summary.skipped == {"same text": 2}
    assert sum(split.documents for split in summary.splits) == 9


def test_special_tokens_have_their_ids_and_are_not_read_from_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer([d.text for d in documents(9)], VOCAB_SIZE, progress=False).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    for i, token in enumerate(("<|end|>", "<|pad|>", "<|reserved|>")):
        assert tokenizer.token_to_id(token) == i
    text = "a<|end|>b \u6f22 \U0001f600\n"
    before = dict(os.environ)
    [row] = encode([text], path, description="", progress=False)
    assert dict(os.environ) == before
    assert row["tokens"][-1] == 0
    assert np.all(row["tokens"][:-1] > 2)
    assert tokenizer.decode(row["tokens"][:-1].tolist()) == text


@pytest.mark.parametrize(
    ("size", "problem"), [(258, "use 259 or more"), (5000, "use that or fewer")]
)
def test_impossible_vocabularies_are_refused(size: int, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size={size}: .*{problem}"):
        train_tokenizer([d.text for d in documents(9)], size, progress=False)


def test_several_processes_encode_the_same(tmp_path: Path) -> None:
    """Enough texts for two processes; the machine decides whether there are two."""
    path = tmp_path / "tokenizer.json"
    texts = [d.text for d in documents(260)]
    train_tokenizer(texts, VOCAB_SIZE, progress=False).save(str(path))
    together = encode(texts, path, description="", progress=False)
    for i, row in enumerate(together):
        if i % 50 == 0:
            [alone] = encode([texts[i]], path, description="", progress=False)
            np.testing.assert_array_equal(row["tokens"], alone["tokens"])
