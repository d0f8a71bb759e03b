"""The sources of a recipe: which documents of a corpus are drawn from, and what identifies them.

`data.loader` opens them on every rank. A corpus was built with splits, or is one folder of shards (as
others wrote them) of which `held_out` keeps a share for validation.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

from data.config import DataConfig, FaultConfig, SourceConfig
from data.content import Content, Documents
from data.indexed import IndexedDocuments, is_indexed
from data.manifest import MANIFEST_NAME, SPLITS, WITHOUT_SPLITS, Manifest, file_sha256
from data.order import permute, round_keys, skip_held_out
from data.reader import SplitReader, read_manifest
from data.storage import Folder, inside, open_folder
from data.tokenizer import read_vocabulary

Pictures: TypeAlias = Callable[[SplitReader], Documents]
"""Makes documents of a corpus that holds images or clips."""

_CHOICE_KEYS = round_keys(0, "held out", 0)
"""Of the permutation that chooses documents: the same in every run, whatever its seed."""
_CACHED_DOCUMENTS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What lanes draw from."""

    documents: Documents
    place: Callable[[int], tuple[str, str]]
    """Shard and key of a document."""


def open_sources(
    config: DataConfig, *, split: str, pictures: Pictures | None = None
) -> dict[str, Source]:
    """The sources of a split by name; for validation, those that have weight and held-out documents.

    Args:
        config: what to read.
        split: train or validation.
        pictures: of the model; None: it takes none.

    Raises:
        ValueError: files are missing, of another tokenizer, or too few for the recipe; pictures for a
            model that takes none.
        CorruptShardError: a shard or its index is not what was written.
        UnreadableError: the storage fails.
    """
    if not config.sources:
        raise ValueError("data.sources={}: needs a source; use e.g. {code: {path: corpus/code}}")
    tokenizer = file_sha256(Path(config.tokenizer), key=f"data.tokenizer={config.tokenizer}")
    opened = {}
    for name, source in sorted(config.sources.items()):
        if split == "train" or source.weight:
            found = open_source(name, config, split=split, tokenizer=tokenizer, pictures=pictures)
            if found:
                opened[name] = found
    if not opened:
        raise ValueError(
            "data.sources: none with weight has documents for validation; use for example "
            f"data.sources.{min(config.sources)}.held_out=0.01, or evaluate.every_steps=0"
        )
    return opened


def open_source(
    name: str,
    config: DataConfig,
    *,
    split: str,
    tokenizer: str,
    pictures: Pictures | None = None,
) -> Source | None:
    """A source of the recipe; None: nothing of it is held out for validation.

    Args:
        name: of the source.
        config: the recipe's data.
        split: train or validation.
        tokenizer: hash of the recipe's tokenizer.
        pictures: see `open_sources`, like the errors.
    """
    source = config.sources[name]
    if is_indexed(source.path):
        stored = WITHOUT_SPLITS
        indexed = _open_indexed(name, config)
        opened = Source(documents=indexed, place=indexed.place)
    else:
        stored = WITHOUT_SPLITS if WITHOUT_SPLITS in _splits(source.path, config.faults) else split
        opened = _open_shards(name, config, stored=stored, tokenizer=tokenizer, pictures=pictures)
    if stored == WITHOUT_SPLITS and source.held_out is None and split != "train":
        return None
    chosen = _choice(name, source, len(opened.documents), stored, split)
    return opened if chosen is None else _restrict(opened, *chosen)


def _open_indexed(name: str, config: DataConfig) -> IndexedDocuments:
    return IndexedDocuments(
        Path(config.sources[name].path),
        source=name,
        vocab_size=read_vocabulary(Path(config.tokenizer)).size,
    )


def _open_shards(
    name: str, config: DataConfig, *, stored: str, tokenizer: str, pictures: Pictures | None
) -> Source:
    path = config.sources[name].path
    reader = SplitReader(path, source=name, split=stored, faults=config.faults)
    key = f"data.sources.{name}.path={path}"
    if reader.manifest.tokenizer_sha256 != tokenizer:
        raise ValueError(
            f"data.tokenizer={config.tokenizer}: {key} holds token ids of another tokenizer; use the "
            "tokenizer.json that was built with it"
        )
    documents: Documents = reader
    if reader.manifest.media_token_id is not None:
        if pictures is None:
            raise ValueError(
                f"{key}: holds images or clips, and model.vision=null takes none; use a model with "
                "vision, or leave the source out"
            )
        documents = pictures(reader)
    return Source(documents=documents, place=reader.place)


def fingerprint(config: DataConfig) -> str:
    """Identify corpus and tokenizer; a run goes on only with the ones it began with.

    Raises:
        ValueError: a file is missing.
        UnreadableError: the storage fails.
    """
    digest = hashlib.sha256(file_sha256(Path(config.tokenizer), key="data.tokenizer").encode())
    for name, source in sorted(config.sources.items()):
        key = f"data.sources.{name}.path"
        if is_indexed(source.path):
            sidecar, payload = (Path(source.path + suffix) for suffix in (".idx", ".bin"))
            size = payload.stat().st_size
            digest.update(f"{name} {size} {file_sha256(sidecar, key=key)}".encode())
            continue
        for split, folder in _splits(source.path, config.faults).items():
            read_manifest(folder, key)
            digest.update(f"{name}/{split} ".encode())
            digest.update(hashlib.sha256(folder.view(MANIFEST_NAME).tobytes()).hexdigest().encode())
    return digest.hexdigest()


def vocab_size(config: DataConfig) -> int:
    """Size of the vocabulary that the token ids come from; every id is below it.

    Raises:
        ValueError: a manifest is missing.
        UnreadableError: the storage fails.
    """
    return max(size for _, size, _ in _training_sizes(config))


def supply_problem(config: DataConfig, tokens: int) -> str | None:
    """Why the sources cannot give that many tokens with their epochs; None: nothing is known against it.

    Counted where sequences are full: text that is concatenated. A lane may still run out earlier
    than the sum, for lanes have different documents.

    Raises:
        ValueError: a manifest is missing.
        UnreadableError: the storage fails.
    """
    weighted = {name for name, source in config.sources.items() if source.weight}
    for change in config.weight_schedule:
        weighted |= {name for name, weight in change.weights.items() if weight}
    limits = {name: source.epochs for name, source in config.sources.items() if name in weighted}
    if config.packing != "concat_split" or None in limits.values():
        return None
    supply, terms = 0, []
    for name, _, number in _training_sizes(config):
        if number is None:
            return None
        if epochs := limits.get(name):
            supply += number * epochs
            terms.append(f"data.sources.{name}.epochs={epochs} x {number} tokens")
    if supply >= tokens:
        return None
    return (
        f"{', '.join(terms)}: {supply} tokens at most, but train.steps and the batch sizes take "
        f"{tokens}; use more epochs (null: no end), more documents or fewer steps"
    )


def training_manifests(config: DataConfig) -> Iterator[tuple[str, Manifest]]:
    """Name and manifest of each source, of what it has for training.

    Raises:
        ValueError: a manifest is missing.
        UnreadableError: the storage fails.
    """
    for name, source in sorted(config.sources.items()):
        if is_indexed(source.path):
            continue
        folders = _splits(source.path, config.faults)
        folder = folders.get("train") or folders[WITHOUT_SPLITS]
        yield name, read_manifest(folder, f"data.sources.{name}.path={source.path}")


def _training_sizes(config: DataConfig) -> Iterator[tuple[str, int, int | None]]:
    """Name, size of the vocabulary and number of tokens, which is None where there are media."""
    for name, manifest in training_manifests(config):
        has_media = manifest.media_token_id is not None
        yield name, manifest.vocab_size, None if has_media else manifest.tokens
    for name, source in sorted(config.sources.items()):
        if is_indexed(source.path):
            vocabulary = read_vocabulary(Path(config.tokenizer))
            yield name, vocabulary.size, _open_indexed(name, config).tokens


def _splits(path: str, faults: FaultConfig) -> dict[str, Folder]:
    """Folders of a source by split: `all` where the manifest lies in the source's own folder."""
    whole = open_folder(path, faults)
    if MANIFEST_NAME in whole.sizes():
        return {WITHOUT_SPLITS: whole}
    return {split: open_folder(inside(path, split), faults) for split in SPLITS}


def _choice(
    name: str, source: SourceConfig, size: int, stored: str, split: str
) -> tuple[int, Callable[[int], int]] | None:
    """How many of `size` documents are drawn from, and which; None: all."""
    held = _held_out(name, source, size, stored)
    if split == "validation":
        first, number = 0, held
        if stored != WITHOUT_SPLITS:
            return None
    elif source.max_documents is not None:
        first, number = held, source.max_documents
        if number > size - held:
            raise ValueError(
                f"data.sources.{name}.max_documents={number}: there are {size - held} to train on; "
                "use at most that many, or null"
            )
    elif held:
        return size - held, partial(skip_held_out, size=size, held=held, keys=_CHOICE_KEYS)
    else:
        return None
    return number, lambda position: permute(first + position, size, _CHOICE_KEYS)


def _held_out(name: str, source: SourceConfig, size: int, stored: str) -> int:
    if source.held_out is None:
        return 0
    key = f"data.sources.{name}.held_out={source.held_out}"
    if stored != WITHOUT_SPLITS:
        raise ValueError(f"{key}: {source.path} was built with its own validation split; use null")
    held = round(size * source.held_out)
    if not 0 < held < size:
        raise ValueError(
            f"{key}: leaves {held} of {size} documents for validation and {size - held} for training; "
            "use another share"
        )
    return held


def _restrict(source: Source, number: int, choose: Callable[[int], int]) -> Source:
    numbered = lru_cache(_CACHED_DOCUMENTS)(choose)
    return Source(
        documents=_Chosen(source.documents, number, numbered),
        place=lambda document: source.place(numbered(document)),
    )


class _Chosen:
    """Some of the documents, numbered anew."""

    def __init__(self, documents: Documents, number: int, choose: Callable[[int], int]) -> None:
        self._documents, self._number, self._choose = documents, number, choose

    def __len__(self) -> int:
        return self._number

    def num_tokens(self, document: int) -> int:
        return self._documents.num_tokens(self._choose(document))

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        return self._documents.spans(self._choose(document))

    def read(self, document: int) -> Content:
        return self._documents.read(self._choose(document))
