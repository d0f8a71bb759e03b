"""IndexedDatasets: what megatron-core writes is read, and what is written megatron-core reads."""

import pickle
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.config import DataConfig, SourceConfig
from data.content import Documents
from data.convert import to_megatron, to_webdataset
from data.faults import DamagedSampleError
from data.indexed import IndexedDocuments, is_indexed
from data.loader import build_loader
from data.manifest import Manifest
from data.sources import open_sources, supply_problem, vocab_size
from data.tars import CorruptShardError
from tests.unit.data.imports import VOCAB_SIZE, WORDS, build, samples, tokenizer_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

DOCUMENTS: list[list[list[int]]] = [
    [[5, 6, 7], [8, 0]],
    [[9, 0]],
    [],
    [[]],
    [[1, 2], [], [3, 4], [0]],
]
"""Documents of sequences; two have no tokens."""


def joined(sequences: list[list[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


def write(prefix: Path, dtype: Any, documents: list[list[list[int]]] = DOCUMENTS) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.array(joined(sequences), dtype), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_core_writes_is_read(tmp_path: Path, dtype: Any) -> None:
    write(tmp_path / "c.text", dtype)
    assert is_indexed(str(tmp_path / "c.text"))
    documents = IndexedDocuments(tmp_path / "c.text", source="c", vocab_size=10)
    assert isinstance(documents, Documents)
    expected = [joined(document) for document in DOCUMENTS if joined(document)]
    assert [documents.num_tokens(i) for i in range(len(documents))] == list(map(len, expected))
    again = pickle.loads(pickle.dumps(documents))
    for reader in (documents, again):
        read = [reader.read(i).tokens for i in range(len(reader))]
        assert [tokens.tolist() for tokens in read] == expected
        assert all(tokens.dtype.kind == "u" for tokens in read)
    assert documents.spans(0) == ()
    assert documents.place(2) == (str(tmp_path / "c.text.bin"), "document 4")


def test_ids_that_are_not_in_the_vocabulary_are_damage(tmp_path: Path) -> None:
    write(tmp_path / "c", np.int32, [[[5, 10, 1]], [[3, -1]], [[9]]])
    documents = IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)
    assert documents.read(2).tokens.tolist() == [9]
    for document, token in ((0, 10), (1, -1)):
        with pytest.raises(
            DamagedSampleError, match=f"token id {token}, vocabulary of 10"
        ) as error:
            documents.read(document)
        assert error.value.fault.key == f"document {document}"


def test_files_of_another_length_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", np.uint16)
    documents = IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)
    whole = {ending: (tmp_path / f"c{ending}").read_bytes() for ending in (".bin", ".idx")}
    for ending, payload in whole.items():
        (tmp_path / f"c{ending}").write_bytes(payload[:-2])
        with pytest.raises(CorruptShardError, match=f"c{ending}: {len(payload) - 2} bytes, but"):
            IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)
        if ending == ".bin":
            with pytest.raises(DamagedSampleError, match=r"truncated, 8 of 10 bytes"):
                documents.read(len(documents) - 1)
        (tmp_path / f"c{ending}").write_bytes(payload)
    (tmp_path / "c.idx").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is not an index of megatron-core"):
        IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)
    (tmp_path / "c.bin").unlink()
    with pytest.raises(ValueError, match=r"data.sources.c.path=.*: there is no .*c.bin; copy both"):
        IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)


def test_floats_and_bytes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", np.uint8)
    with pytest.raises(ValueError, match="version 1 and ids of type 1; tokens are of type 8"):
        IndexedDocuments(tmp_path / "c", source="c", vocab_size=10)


def corpus(folder: Path) -> Path:
    (folder / "in").mkdir()
    for i in range(20):
        (folder / f"in/{i:02d}").write_text(" ".join(WORDS[i % 12 :]) + f" {i} \u6f22")
    build(folder / "corpus", {"text": str(folder / "in")}, held_out=0.3)
    return folder / "corpus/new"


def test_there_and_back(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    number = to_megatron(source, tmp_path / "out/new", split="train", progress=False)
    read = IndexedDataset(str(tmp_path / "out/new"))
    stored = samples(source / "train")
    assert number == len(read) == len(stored)
    assert read.index.dtype == np.uint16
    for i, sample in enumerate(stored.values()):
        assert read[i].tolist() == np.frombuffer(sample["u16"], "<u2").tolist()
    assert read.document_indices.tolist() == list(range(len(stored) + 1))
    tokenizer = tokenizer_file(tmp_path)
    back = tmp_path / "back"
    assert to_webdataset(tmp_path / "out/new", back, tokenizer=tokenizer, progress=False) == number
    found = samples(back)
    for one, other in zip(stored.values(), found.values(), strict=True):
        assert (one["txt"], one["u16"]) == (other["txt"], other["u16"])
    manifest = Manifest.read(back, key="")
    assert (manifest.split, manifest.vocab_size) == (
        "all",
        Tokenizer.from_file(str(tokenizer)).get_vocab_size(),
    )


def test_a_recipe_trains_on_it(tmp_path: Path) -> None:
    """With a share held out, chosen by hash; batches hold the documents' tokens."""
    source = corpus(tmp_path)
    to_megatron(source, tmp_path / "new", split="train", progress=False)
    config = DataConfig(
        sources={"c": SourceConfig(path=str(tmp_path / "new"), held_out=0.25)},
        tokenizer=str(tokenizer_file(tmp_path)),
        sequence_length=16,
        prefetch_batches=0,
    )
    opened = {split: open_sources(config, split=split)["c"] for split in ("train", "validation")}
    everything = IndexedDocuments(tmp_path / "new", source="c", vocab_size=VOCAB_SIZE)
    keys = [found.place(i)[1] for found in opened.values() for i in range(len(found.documents))]
    assert sorted(keys) == sorted(everything.place(i)[1] for i in range(len(everything)))
    assert len(opened["validation"].documents) == round(0.25 * len(everything))
    assert vocab_size(config) == VOCAB_SIZE
    once = replace(config, sources={"c": replace(config.sources["c"], epochs=1)})
    assert supply_problem(once, everything.tokens) is None
    problem = supply_problem(once, everything.tokens + 1)
    assert problem is not None
    assert f"epochs=1 x {everything.tokens} tokens" in problem
    loader = build_loader(
        config, split="train", seed=0, global_batch_size=2, data_rank=0, data_size=1
    )
    known = b"".join(everything.read(i).tokens.tobytes() for i in range(len(everything)))
    for batch, _ in islice(loader, 5):
        for row in batch.input_ids.numpy().astype(np.uint16):
            assert row[:3].tobytes() in known


def test_conversions_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    with pytest.raises(ValueError, match=r"--split=all: .* has train, validation"):
        to_megatron(source, tmp_path / "out", split="all", progress=False)
    (tmp_path / "out.idx").touch()
    with pytest.raises(ValueError, match=r"out.idx: exists; remove it or choose another name"):
        to_megatron(source, tmp_path / "out", split="train", progress=False)
    with pytest.raises(ValueError, match="exists; remove it or choose another folder"):
        to_webdataset(tmp_path / "c", source, tokenizer=tokenizer_file(tmp_path), progress=False)
