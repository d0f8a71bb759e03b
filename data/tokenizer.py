"""Learns a vocabulary and encodes documents with it; builds call this, training never does.

`tokenizers` learns and encodes, `datasets` spreads the encoding over processes.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT, PADDING, RESERVED = "<|end|>", "<|pad|>", "<|reserved|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING, RESERVED)
"""Ids 0, 1, 2."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
# What published tokenizers call the end of a document, and a token that no text becomes.
_ENDS = (
    END_OF_DOCUMENT,
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "</s>",
    "<eos>",
)
_MEDIA_MARKERS = (
    RESERVED,
    "<|image_pad|>",
    "<|image|>",
    "<image>",
    "<\uff5cplace\u2581holder\u2581no\u25810\uff5c>",  # DeepSeek
)
Table: TypeAlias = Any
"""A `datasets.Dataset`, which has no types."""
Datasets: TypeAlias = Any
"""The module `datasets`."""
_ENCODE_BATCH = 64
_DOCUMENTS_PER_PROCESS = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a build needs to know of a tokenizer."""

    size: int
    """One more than the highest id."""
    end: int
    """Id of the end of a document."""
    media: int | None
    """Id that marks the place of an image or clip; None: the tokenizer has none."""


def read_vocabulary(tokenizer: Path) -> Vocabulary:
    """Look into a tokenizer file.

    Raises:
        ValueError: it is no `tokenizers` file, or does not name the end of a document.
    """
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{tokenizer}: not a file of `tokenizers` ({error}); give a tokenizer.json"
        ) from error
    ids = loaded.get_vocab(with_added_tokens=True)
    # No text becomes these; other added tokens are found in texts.
    added = loaded.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    end = next((ids[token] for token in _ENDS if token in special), None)
    if end is None:
        raise ValueError(
            f"{tokenizer}: none of its special tokens ends a document; add one named "
            f"{END_OF_DOCUMENT}"
        )
    media = next((ids[token] for token in _MEDIA_MARKERS if token in special), None)
    return Vocabulary(size=max(ids.values()) + 1, end=end, media=media)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, progress: bool, *, length: int | None = None
) -> Tokenizer:
    """Byte-level BPE (every text can be encoded, and decoded to the same bytes).

    Args:
        texts: to learn from.
        vocab_size: special tokens included.
        progress: show bars on stderr.
        length: number of texts, if known, for the bars.

    Raises:
        ValueError: vocab_size leaves no room for the bytes and the special tokens, or the texts
            have too few pairs to fill it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size}: must hold all bytes; use {SMALLEST_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=length)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the corpus yields {tokenizer.get_vocab_size()} tokens; use "
            "that or fewer"
        )
    return tokenizer


def encode(
    texts: list[str], tokenizer: Path, *, description: str, progress: bool
) -> Iterable[Mapping[str, NDArray[np.int64]]]:
    """Token ids of each text, END_OF_DOCUMENT included, under `tokens` of each row.

    `datasets` runs `encode_texts` in as many processes as the machine and the work justify.
    """
    processes = min(os.cpu_count() or 1, 1 + len(texts) // _DOCUMENTS_PER_PROCESS)
    with hugging_face(progress) as datasets:
        table = datasets.Dataset.from_dict({"text": texts})
        encoded = table.map(
            encode_texts,
            fn_kwargs={"tokenizer": str(tokenizer)},
            batched=True,
            batch_size=_ENCODE_BATCH,
            num_proc=processes if processes > 1 else None,
            desc=description,
        )
    rows: Iterable[Mapping[str, NDArray[np.int64]]] = encoded.with_format("numpy", ["tokens"])
    return rows


def encode_texts(batch: Mapping[str, list[str]], tokenizer: str) -> dict[str, list[list[int]]]:
    """What `datasets` runs in its processes.

    A text that contains the spelling of a special token gets the ids of its letters instead.
    """
    loaded = _load_tokenizer(tokenizer)
    end = SPECIAL_TOKENS.index(END_OF_DOCUMENT)
    encodings = loaded.encode_batch(batch["text"], add_special_tokens=False)
    return {"tokens": [[*encoding.ids, end] for encoding in encodings]}


def encode_parts(
    batch: Mapping[str, list[Any]], tokenizer: str, end: int, media: int | None
) -> dict[str, list[list[int | None]]]:
    """Token ids of the documents in `parts`, as `encode_texts`; a part that is None becomes `media`."""
    loaded = _load_tokenizer(tokenizer)
    texts = [part for parts in batch["parts"] for part in parts if part is not None]
    encodings = iter(loaded.encode_batch(texts, add_special_tokens=False))
    documents: list[list[int | None]] = []
    for parts in batch["parts"]:
        ids: list[int | None] = []
        for part in parts:
            ids += [media] if part is None else next(encodings).ids
        documents.append([*ids, end])
    return {"tokens": documents}


def decoded_tokens(tokenizer: Path) -> list[str]:
    """Text of each token id, decoded singly; bytes that are no whole character read U+FFFD."""
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = [[token] for token in range(loaded.get_vocab_size())]
    texts: list[str] = loaded.decode_batch(ids, skip_special_tokens=False)
    return texts


def padding_id(tokenizer: Path) -> int:
    """Id of PADDING, or 0 in a tokenizer of others: padding is masked, so that any token would do."""
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    return next((int(token["id"]) for token in added if token["content"] == PADDING), 0)


@lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # which others' files may ask for
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def hugging_face(progress: bool, *, offline: bool = True) -> Iterator[Datasets]:
    """The module `datasets`: its bars on or off, and without a hub unless asked for.

    There is no thread pool in `tokenizers`, whose processes are forked after it was used.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false"}
    if offline:
        wanted |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        # Here, for it reads its switches from the environment on import.
        import datasets  # noqa: PLC0415

        bars = datasets.is_progress_bar_enabled()
        (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
        try:
            yield datasets
        finally:
            (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
