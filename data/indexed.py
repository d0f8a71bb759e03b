"""Reads pre-tokenised corpora of megatron-core: PREFIX.bin with token ids, PREFIX.idx with lengths.

The format is that of `megatron.core.datasets.indexed_dataset`; `data.convert` writes it with their
builder. It is read here, for two arrays do not need the import of megatron-core in every rank
and worker. There are no checksums in it: what can be checked is the size of the files, and that
ids are in the vocabulary.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.content import Content
from data.faults import Cause, DamagedSampleError, Fault
from data.tars import CorruptShardError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, document bounds
_DTYPES: dict[int, np.dtype[np.integer[Any]]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Code of the type of the ids -> type, as megatron-core chooses them for tokens."""
_REMEDY = (
    "restore the file from a copy, or use the tokenizer that it was made with; to train without what "
    "is damaged, use data.faults.damaged=skip"
)


class IndexedDocuments:
    """Documents of an IndexedDataset, a `data.content.Documents`; those without tokens are left out.

    A document may have several sequences, which follow each other. Nothing is added: there is an end
    of document where the corpus was made with one.
    """

    def __init__(self, prefix: Path, *, source: str, vocab_size: int) -> None:
        """Map the index.

        Args:
            prefix: path of both files, without .bin and .idx.
            source: name of the source.
            vocab_size: ids must be below it.

        Raises:
            ValueError: a file is missing, or is no text corpus of this format.
            CorruptShardError: the files are not as long as the index says.
        """
        self.source, self.prefix = source, prefix
        self._vocab_size = vocab_size
        self._key = f"data.sources.{source}.path={prefix}"
        self._bin, index = _beside(prefix, ".bin"), _beside(prefix, ".idx")
        for path in (self._bin, index):
            if not path.is_file():
                raise ValueError(f"{self._key}: there is no {path.absolute()}; copy both files")
        self._map_index(index)
        self._file: int | None = None

    def _map_index(self, path: Path) -> None:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{self._key}: {path} is not an index of megatron-core")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise ValueError(
                f"{self._key}: {path} has version {version} and ids of type {code}; tokens are of "
                "type 8 (uint16) or 4 (int32) in version 1"
            )
        size = _HEADER.size + 12 * sequences + 8 * bounds
        if path.stat().st_size != size:
            raise CorruptShardError(f"{path}: {path.stat().st_size} bytes, but {size} were written")
        self._dtype = _DTYPES[code]
        raw = np.memmap(path, np.uint8, "r", _HEADER.size)
        self._lengths = raw[: 4 * sequences].view("<i4")
        self._offsets = raw[4 * sequences : 12 * sequences].view("<i8")
        self._bounds = raw[12 * sequences :].view("<i8")
        expected = 0
        if sequences:
            expected = int(self._offsets[-1]) + int(self._lengths[-1]) * self._dtype.itemsize
        if self._bin.stat().st_size != expected:
            raise CorruptShardError(
                f"{self._bin}: {self._bin.stat().st_size} bytes, but {expected} were written"
            )
        self._numbers = self._with_tokens()

    def _with_tokens(self) -> NDArray[np.int64] | None:
        """Numbers of the documents that have tokens; None: all have."""
        first, last = self._bounds[:-1], self._bounds[1:]
        if len(self._lengths) and (self._lengths > 0).all() and (last > first).all():
            return None
        tokens = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        return np.flatnonzero(tokens[last] > tokens[first])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._bounds) - 1 if self._numbers is None else len(self._numbers)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self._lengths.sum(dtype=np.int64))

    def num_tokens(self, document: int) -> int:
        """Length of a document in tokens, from the index alone."""
        return int(self._lengths[self._sequences(document)].sum(dtype=np.int64))

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        """Nothing of text must stay whole."""
        return ()

    def read(self, document: int) -> Content:
        """The token ids of a document.

        Raises:
            DamagedSampleError: the file got shorter, or an id is not in the vocabulary.
        """
        start = int(self._offsets[self._sequences(document).start])
        size = self.num_tokens(document) * self._dtype.itemsize
        if self._file is None:
            self._file = os.open(self._bin, os.O_RDONLY | os.O_CLOEXEC)
        raw = os.pread(self._file, size, start)
        if len(raw) != size:
            raise self._damaged(document, "truncated", f"{len(raw)} of {size} bytes")
        tokens = np.frombuffer(raw, self._dtype)
        # As unsigned numbers, negative ids are too large.
        ids: NDArray[np.unsignedinteger] = tokens.view(f"<u{self._dtype.itemsize}")
        if int(ids.max()) >= self._vocab_size:
            wrong = tokens[ids >= self._vocab_size][0]
            raise self._damaged(
                document, "undecodable", f"token id {wrong}, vocabulary of {self._vocab_size}"
            )
        return Content(ids)

    def place(self, document: int) -> tuple[str, str]:
        """File and name of a document, for people."""
        number = document if self._numbers is None else int(self._numbers[document])
        return str(self._bin.absolute()), f"document {number}"

    def __getstate__(self) -> dict[str, object]:
        """For other processes, which open the file themselves."""
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        """Close the file."""
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def _sequences(self, document: int) -> slice:
        number = document if self._numbers is None else int(self._numbers[document])
        return slice(int(self._bounds[number]), int(self._bounds[number + 1]))

    def _damaged(self, document: int, cause: Cause, detail: str) -> DamagedSampleError:
        return DamagedSampleError(Fault(self.source, *self.place(document), cause, detail), _REMEDY)


def is_indexed(path: str) -> bool:
    """Whether a path is the prefix of such a corpus, here on this machine."""
    return Path(path + ".idx").is_file()


def _beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)
