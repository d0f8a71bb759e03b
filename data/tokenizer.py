"""Learns a vocabulary and encodes documents with it; `data.build` calls this, training never does.

`tokenizers` learns and encodes, `datasets` spreads the encoding over processes.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT, PADDING, RESERVED = "<|end|>", "<|pad|>", "<|reserved|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING, RESERVED)
"""Ids 0, 1, 2."""
_ENCODE_BATCH = 64
_DOCUMENTS_PER_PROCESS = 250


def train_tokenizer(texts: list[str], vocab_size: int, progress: bool) -> Tokenizer:
    """Byte-level BPE (every text can be encoded, and decoded to the same bytes).

    Raises:
        ValueError: vocab_size leaves no room for the bytes and the special tokens, or the texts
            have too few pairs to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: must hold all bytes; use {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
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
    with _offline():
        # Here, for it reads its switches from the environment on import.
        import datasets  # noqa: PLC0415

        bars = datasets.is_progress_bar_enabled()
        (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
        try:
            table = datasets.Dataset.from_dict({"text": texts})
            encoded = table.map(
                encode_texts,
                fn_kwargs={"tokenizer": str(tokenizer)},
                batched=True,
                batch_size=_ENCODE_BATCH,
                num_proc=processes if processes > 1 else None,
                desc=description,
            )
        finally:
            (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
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
    return tokenizer


@contextmanager
def _offline() -> Iterator[None]:
    """No hub, and no thread pool in `tokenizers`, whose processes are forked after it was used."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
