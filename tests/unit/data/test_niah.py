"""Needles in haystacks: documents are taken apart again, as text, by an expression of their own."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.manifest import SPLITS, file_sha256
from data.niah import Alphabet, NiahShape, build_niah, niah_document, read_alphabet
from data.reader import SplitReader
from data.shards import Sample, write_split
from data.tokenizer import SPECIAL_TOKENS

SHAPE = NiahShape(
    tokens=64, needles=2, questions=3, words=3, train_documents=60, validation_documents=40
)
THREE = NiahShape(tokens=64, needles=3, questions=2, words=6)
ALPHABET = Alphabet(
    needle=np.array([1, 2]),
    question=np.array([1, 3]),
    keys=np.arange(10, 16),
    values=np.arange(20, 26),
    end=0,
)


def texts(corpus: Path, source: str, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    reader = SplitReader(corpus / source, source=source, split=split)
    documents = [reader.stored_tokens(number).tolist() for number in range(len(reader))]
    if source == "niah":
        assert all(len(document) == SHAPE.tokens for document in documents)
        assert all(document.index(0) == SHAPE.tokens - 1 for document in documents)
    found: list[str] = tokenizer.decode_batch([document[:-1] for document in documents])
    return found


WORDS = [
    "river",
    "stone",
    "table",
    "cloud",
    "green",
    "paper",
    "music",
    "north",
    "silver",
    "window",
    "garden",
    "letter",
]


def write_docs(corpus: Path) -> None:
    """Random words, and a tokenizer to which each of them is a token."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 30)) + f"\n{number}" for number in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    corpus.mkdir()
    path = corpus / "tokenizer.json"
    tokenizer.save(str(path))
    for number, split in enumerate(SPLITS):
        write_split(
            corpus / "docs" / split,
            [
                Sample(
                    key=f"{index:03d}",
                    metadata={},
                    text=text,
                    tokens=np.array([*tokenizer.encode(text).ids, 0], np.uint32),
                )
                for index, text in enumerate(texts[number::2])
            ],
            source="docs",
            split=split,
            tokenizer_sha256=file_sha256(path, key="tokenizer"),
            vocab_size=tokenizer.get_vocab_size(),
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the needles."""
    folder = tmp_path_factory.mktemp("niah") / "corpus"
    write_docs(folder)
    manifests = build_niah(folder, SHAPE)
    assert [(m.split, m.samples) for m in manifests] == [("train", 60), ("validation", 40)]
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_for_needles_in_text_of_the_split(corpus: Path, split: str) -> None:
    haystack = "".join(texts(corpus, "docs", split))
    word = "|".join(WORDS)  # text may follow a value without a space
    needle, answers = rf"\n# ({word}) ({word})", set()
    for text in texts(corpus, "niah", split):
        questions = re.search(r"(\n\? \w+ \w+){3}$", text)
        assert questions is not None
        hay = text[: questions.start()]
        needles = re.findall(needle, hay)
        assert len(needles) == len(dict(needles)) == 2
        assert set(re.findall(r"\n\? (\w+) (\w+)", questions[0])) <= set(needles)
        hay = re.sub(needle, "", hay)
        assert hay in haystack or "\ufffd" in hay  # a cut may lie within a character
        answers.update(needles)
    assert len(answers) == 9  # pairs are drawn anew


def test_splits_and_seeds_differ_and_builds_repeat(corpus: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for copy, seed in ((again, 0), (other, 1)):
        copy.mkdir()
        for name in ("docs", "tokenizer.json"):
            (copy / name).symlink_to(corpus / name)
        build_niah(copy, SHAPE, seed=seed)
    assert texts(again, "niah", "train") == texts(corpus, "niah", "train")
    assert texts(other, "niah", "train") != texts(corpus, "niah", "train")
    assert not set(texts(corpus, "niah", "train")) & set(texts(corpus, "niah", "validation"))


def test_what_is_there_or_missing_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="niah: is there already; remove it"):
        build_niah(corpus, SHAPE)
    with pytest.raises(ValueError, match="mneme data build quickstart"):
        build_niah(tmp_path, SHAPE)
    with pytest.raises(ValueError, match="words of one token"):
        read_alphabet(corpus / "tokenizer.json", 4096)


def test_every_needle_is_asked_for_as_often_whatever_was_asked_before() -> None:
    text, random = np.full(200, 50), np.random.default_rng(0)
    asked, first_places = np.zeros((3, 3)), set()
    for _ in range(400):
        document = niah_document(text, THREE, ALPHABET, random)
        assert len(document) == THREE.tokens
        needles = [tuple(document[i + 2 : i + 4]) for i in np.flatnonzero(document == 2) - 1]
        questions = [tuple(document[i + 2 : i + 4]) for i in np.flatnonzero(document == 3) - 1]
        first, second = map(needles.index, questions)
        asked[first, second] += 1
        first_places.add(int(np.argmax(document == 2)))
    assert asked.min() > 20  # a ninth of them: 44 +- 6
    assert len(first_places) > 20


def test_a_document_without_room_for_text_is_refused() -> None:
    small = replace(THREE, tokens=21)
    with pytest.raises(ValueError, match=r"tokens=21: 3 needles .* use 22 or more"):
        niah_document(np.full(200, 50), small, ALPHABET, np.random.default_rng(0))
