"""Builds the multimodal quickstart corpus: that of `data.build` and one more source, `pictures`."""

import shutil
from collections import Counter
from pathlib import Path

from data.build import (
    CorpusSummary,
    build_quickstart_corpus,
    read_summary,
    summarize,
    write_summary,
)
from data.build_folder import building
from data.corpus import package_docstrings
from data.manifest import SPLITS, Manifest
from data.pictures_corpus import build_pictures

_SOURCE = "pictures"


def build_quickstart_mm_corpus(
    destination: Path, *, vocab_size: int = 4096, progress: bool = True
) -> CorpusSummary:
    """Build the quickstart corpus at `destination` with pictures, or add them, or find them there.

    Args:
        destination: folder of the corpus.
        vocab_size: of the tokenizer, special tokens included.
        progress: show progress bars on stderr.

    Raises:
        ValueError: `destination` holds something else, or packages with pictures are missing.
    """
    summary = build_quickstart_corpus(destination, vocab_size=vocab_size, progress=progress)
    if _SOURCE in {split.source for split in summary.splits}:
        return summary
    folder = destination / _SOURCE
    with building(destination, _SOURCE) as work:
        if not folder.exists():  # else only the entry in corpus.json is missing
            made = work / _SOURCE
            if made.exists():
                shutil.rmtree(made)
            documents = list(package_docstrings(Counter()))
            tokenizer = destination / "tokenizer.json"
            build_pictures(made, documents, tokenizer, vocab_size=vocab_size, progress=progress)
            made.rename(folder)
        manifests = [Manifest.read(folder / split, key=str(folder)) for split in SPLITS]
        summary = summarize(destination, destination, manifests, {}, read_summary(destination))
        write_summary(destination, summary)
    return summary
