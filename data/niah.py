r"""A needle-in-a-haystack source for small models: `mneme data build niah` adds it to a corpus.

Multi-query, after RULER (arXiv 2404.06654, section 3): several keys with values are hidden in running
text, and at the end of the document there are questions for them, drawn with replacement. A document:

    ...text\n# river stone text... text\n# moon glass text...\n? moon glass\n? river stone\n? moon glass<end>

Were each needle asked for once, whoever remembers which values were given already would find 52 % of those of
four needles, and the last one always, without looking up a single key.

Text is that of the corpus' own split, keys and values are words that are one token each, and pairs are
drawn anew for every document: nothing but the document says which value belongs to a key.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.config import PAIR_TOKENS
from data.manifest import SPLITS, Manifest, file_sha256
from data.reader import SplitReader
from data.shards import Sample, write_split
from data.tokenizer import decoded_tokens, read_vocabulary

SOURCE = "niah"
_NEEDLE, _QUESTION = "\n#", "\n?"
_HAYSTACK = "docs"
_SHORTEST_WORD = 4

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class NiahShape:
    """How documents look."""

    tokens: int = 128
    """Length of every document, its end included: one fills a sequence."""
    needles: int = 4
    """Pairs hidden in a document."""
    questions: int = 24
    """Each is for any one of them."""
    words: int = 16
    """Keys to draw from, and as many values."""
    train_documents: int = 32768
    validation_documents: int = 512

    def documents(self, split: str) -> int:
        """Number of documents of a split."""
        return self.train_documents if split == "train" else self.validation_documents


@dataclass(frozen=True, slots=True)
class Alphabet:
    """What needles are made of, as token ids."""

    needle: Ids
    question: Ids
    keys: Ids
    values: Ids
    end: int


def build_niah(corpus: Path, shape: NiahShape | None = None, *, seed: int = 0) -> list[Manifest]:
    """Add the source to a corpus that `build_quickstart_corpus` made; whole or not at all.

    Args:
        corpus: has the tokenizer and the text for the haystacks.
        shape: of the documents; None: the defaults.
        seed: of all that is drawn.

    Returns:
        What was written, a manifest for each split.

    Raises:
        ValueError: no corpus there, the source is there already, or the tokenizer lacks words.
    """
    shape = shape or NiahShape()
    tokenizer, folder = corpus / "tokenizer.json", corpus / SOURCE
    if not tokenizer.is_file() or not (corpus / _HAYSTACK).is_dir():
        raise ValueError(f"{corpus}: no corpus there; make it with: mneme data build quickstart")
    if folder.exists():
        raise ValueError(f"{folder}: is there already; remove it to build it again")
    alphabet = read_alphabet(tokenizer, shape.words)
    with tempfile.TemporaryDirectory(prefix=f".{SOURCE}-", dir=corpus) as temporary:
        work = Path(temporary) / SOURCE
        manifests = [
            write_split(
                work / split,
                _samples(corpus, split, shape, alphabet, seed),
                source=SOURCE,
                split=split,
                tokenizer_sha256=file_sha256(tokenizer, key="tokenizer"),
                vocab_size=read_vocabulary(tokenizer).size,
            )
            for split in SPLITS
        ]
        work.rename(folder)
    return manifests


def read_alphabet(tokenizer: Path, words: int) -> Alphabet:
    """Marks, keys and values: the rarest words with a space before them, which text seldom holds.

    Raises:
        ValueError: the tokenizer has too few words of one token, or no token for a mark.
    """
    loaded = Tokenizer.from_file(str(tokenizer))
    marks = [np.array(loaded.encode(mark).ids, np.int64) for mark in (_NEEDLE, _QUESTION)]
    found = [
        token
        for token, text in enumerate(decoded_tokens(tokenizer))
        if text[:1] == " " and text[1:].isascii() and text[1:].islower() and text[1:].isalpha()
        if len(text) > _SHORTEST_WORD
    ][-2 * words :]  # the vocabulary was learnt from frequent to rare
    if len(found) < 2 * words or any(len(mark) != PAIR_TOKENS - 2 for mark in marks):
        raise ValueError(
            f"{tokenizer}: has {len(found)} words of one token, or joins a line break and a mark; "
            f"use a byte-level tokenizer with {2 * words} such words, as that of quickstart"
        )
    ids = np.array(found, np.int64)
    end = read_vocabulary(tokenizer).end
    return Alphabet(needle=marks[0], question=marks[1], keys=ids[::2], values=ids[1::2], end=end)


def niah_document(
    text: Ids, shape: NiahShape, alphabet: Alphabet, random: np.random.Generator
) -> Ids:
    """One document; [shape.tokens].

    Args:
        text: at least as many tokens as the haystack takes; it is cut there.
        shape: of the document.
        alphabet: what needles are made of.
        random: draws keys, values, places and the order of the questions.
    """
    keys = random.choice(alphabet.keys, shape.needles, replace=False)
    values = random.choice(alphabet.values, shape.needles, replace=False)
    length = _haystack_tokens(shape)
    places = np.sort(random.integers(0, length + 1, shape.needles))
    parts: list[Ids] = []
    for key, value, piece in zip(keys, values, np.split(text[:length], places), strict=False):
        parts += [piece, alphabet.needle, np.array([key, value])]
    parts.append(text[places[-1] : length])
    for number in random.integers(0, shape.needles, shape.questions):
        parts += [alphabet.question, np.array([keys[number], values[number]])]
    return np.concatenate([*parts, np.array([alphabet.end])])


def _haystack_tokens(shape: NiahShape) -> int:
    """What is left of a document for text."""
    left = shape.tokens - PAIR_TOKENS * (shape.needles + shape.questions) - 1
    if left < 1:
        raise ValueError(
            f"tokens={shape.tokens}: {shape.needles} needles and their questions leave no room for "
            f"text; use {shape.tokens - left + 1} or more"
        )
    return left


def _samples(
    corpus: Path, split: str, shape: NiahShape, alphabet: Alphabet, seed: int
) -> Iterator[Sample]:
    reader = SplitReader(corpus / _HAYSTACK, source=_HAYSTACK, split=split)
    text = np.concatenate([reader.stored_tokens(n)[:-1] for n in range(len(reader))])
    text = text.astype(np.int64)
    loaded = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    random = np.random.default_rng([seed, SPLITS.index(split)])
    length = _haystack_tokens(shape)
    for number in range(shape.documents(split)):
        start = random.integers(0, len(text) - length + 1)
        tokens = niah_document(text[start:], shape, alphabet, random)
        yield Sample(
            key=f"{split}/{number:06d}",
            metadata={"needles": shape.needles},
            text=loaded.decode(tokens[:-1].tolist(), skip_special_tokens=False),
            tokens=tokens.astype(np.uint32),
        )
