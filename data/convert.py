"""Turns shards into an IndexedDataset of megatron-core and back; `mneme data convert` calls this.

Text only, one document at a time. What is made appears by renaming, once it is whole.
"""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.indexed import IndexedDocuments
from data.manifest import WITHOUT_SPLITS, file_sha256, split_folders
from data.reader import SplitReader
from data.shards import Sample, write_split
from data.tokenizer import read_vocabulary


def to_megatron(source: Path, prefix: Path, *, split: str, progress: bool) -> int:
    """Write PREFIX.bin and PREFIX.idx with the stored token ids of a source.

    Args:
        source: folder of a source.
        prefix: of the new files.
        split: which documents; a source without splits has one, "all".
        progress: show a bar on stderr.

    Returns:
        Number of documents.

    Raises:
        ValueError: there is no such split, it has images or clips, or the files are there.
        DamagedSampleError: a document is not what was written.
    """
    if split not in split_folders(source):
        raise ValueError(f"--split={split}: {source} has {', '.join(split_folders(source))}")
    reader = SplitReader(source, source=source.name, split=split)
    if sum(shard.images + shard.videos for shard in reader.manifest.shards):
        raise ValueError(
            f"{source}: has images or clips, which an IndexedDataset cannot hold; convert a source of "
            "text"
        )
    files = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]
    for path in files:
        if path.exists():
            raise ValueError(f"{path}: exists; remove it or choose another name")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what megatron-core imports
        from megatron.core.datasets.indexed_dataset import (  # noqa: PLC0415 - takes seconds
            DType,
            IndexedDatasetBuilder,
        )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = [path.with_name(f"{path.name}.partial") for path in files]
    dtype = DType.optimal_dtype(reader.manifest.vocab_size)
    builder = IndexedDatasetBuilder(str(partial[0]), dtype=dtype)
    for document in tqdm(range(len(reader)), "convert", unit=" documents", disable=not progress):
        tokens = reader.stored_tokens(document)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(partial[1]))
    for path, name in zip(partial, files, strict=True):
        path.rename(name)
    return len(reader)


def to_webdataset(prefix: Path, source: Path, *, tokenizer: Path, progress: bool) -> int:
    """Write the documents of an IndexedDataset as shards of a source without splits.

    The text in the shards is what the tokenizer makes of the ids, which are stored as they are.

    Args:
        prefix: path of the .bin and .idx, without their endings.
        source: folder to make.
        tokenizer: that the ids come from.
        progress: show a bar on stderr.

    Returns:
        Number of documents.

    Raises:
        ValueError: a file is missing or no tokenizer, or the folder exists.
        CorruptShardError, DamagedSampleError: the files are cut short, or an id is not in the
            vocabulary.
    """
    if source.exists():
        raise ValueError(f"{source}: exists; remove it or choose another folder")
    vocabulary = read_vocabulary(tokenizer)
    documents = IndexedDocuments(prefix, source=source.name, vocab_size=vocabulary.size)
    partial = source.with_name(f".{source.name}-building")
    if partial.exists():
        shutil.rmtree(partial)  # of a conversion that was interrupted
    write_split(
        partial,
        _samples(documents, Tokenizer.from_file(str(tokenizer)), vocabulary.end, progress),
        source=source.name,
        split=WITHOUT_SPLITS,
        tokenizer_sha256=file_sha256(tokenizer, key="--tokenizer"),
        vocab_size=vocabulary.size,
    )
    partial.rename(source)
    return len(documents)


def _samples(
    documents: IndexedDocuments, tokenizer: Tokenizer, end: int, progress: bool
) -> Iterator[Sample]:
    for document in tqdm(range(len(documents)), "convert", unit=" documents", disable=not progress):
        ids = documents.read(document).tokens
        text = ids[:-1] if ids[-1] == end else ids
        yield Sample(
            key=f"{document:09d}",
            metadata={"title": documents.place(document)[1]},
            text=tokenizer.decode(text.tolist(), skip_special_tokens=False),
            tokens=ids.astype(np.uint32),
        )
