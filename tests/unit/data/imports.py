"""Builds corpora of files for the tests of importers, and reads them back with stock webdataset."""

import gc
import warnings
from pathlib import Path
from typing import Any

import webdataset

from data.build import CorpusSummary
from data.build_source import SourceRequest, build_source
from data.importers import open_importer
from data.tokenizer import train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "went", "to", "other", "places"]
VOCAB_SIZE = 280
DEFAULTS: dict[str, Any] = {
    "text_key": "text",
    "id_key": None,
    "hf_split": "train",
    "hf_config": None,
    "extensions": [],
    "image_root": None,
    "clip_seconds": None,
}


def tokenizer_file(folder: Path) -> Path:
    path = folder / "given.json"
    if not path.is_file():
        texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)]
        train_tokenizer(texts, VOCAB_SIZE, progress=False).save(str(path))
    return path


def build(
    destination: Path,
    inputs: dict[str, Any],
    *,
    source: str = "new",
    held_out: float = 0.0,
    processes: int = 1,
    **options: Any,
) -> CorpusSummary:
    """Build with a tokenizer that lies beside the corpus, unless `options` say otherwise."""
    options = {"tokenizer": tokenizer_file(destination.parent), "vocab_size": None, **options}
    request = SourceRequest(
        source=source,
        inputs={**DEFAULTS, **inputs},
        held_out=held_out,
        shard_megabytes=options.pop("shard_megabytes", 1),
        limit=options.pop("limit", None),
        **options,
    )
    return build_source(
        destination,
        request,
        lambda tables: open_importer(request.inputs, tables, processes=processes, progress=False),
        processes=processes,
        progress=False,
    )


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Members by key, as a stock reader gives them."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it does not close what it reads
        found = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
        gc.collect()
    by_key = {sample["__key__"]: sample for sample in found}
    assert len(by_key) == len(found)
    return by_key


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
