"""Builds a corpus: documents -> tokenizer -> token ids -> shards. `mneme data build` calls this.

All work happens in a folder beside the destination that is renamed at the end, so an
interrupted build leaves nothing that could be taken for a corpus.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.corpus import Document, package_docstrings, standard_library
from data.manifest import Manifest, corpus_fingerprint, file_sha256
from data.shards import Sample, write_split
from data.tokenizer import encode, train_tokenizer

SUMMARY_NAME = "corpus.json"
_HELD_OUT_ONE_IN = 50
_MIN_HELD_OUT = 32


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What one split of one source holds."""

    source: str
    split: str
    documents: int
    tokens: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a build made, or found made."""

    destination: str
    fingerprint: str
    """As `data.loader.fingerprint` for all sources of the corpus."""
    vocab_size: int
    splits: tuple[SplitSummary, ...]
    skipped: dict[str, int]
    """Files that were left out, by reason."""


def build_quickstart_corpus(
    destination: Path, *, vocab_size: int = 4096, progress: bool = True
) -> CorpusSummary:
    """Build the corpus of `data.corpus` at `destination`, or return at once if it is there.

    Sources: `code` (standard library) and `docs` (docstrings); each is split into train and
    validation by a hash of the document's name.

    Args:
        destination: folder to make; a parent that is missing is made too.
        vocab_size: of the tokenizer, special tokens included.
        progress: show progress bars on stderr.

    Raises:
        ValueError: `destination` holds something else, or a corpus of another vocabulary.
    """
    found = find_corpus(destination, vocab_size)
    if found:
        return found
    skipped: Counter[str] = Counter()
    sources = {"code": standard_library(skipped), "docs": package_docstrings(skipped)}
    return build_corpus(
        destination, sources, vocab_size=vocab_size, skipped=skipped, progress=progress
    )


def find_corpus(destination: Path, vocab_size: int) -> CorpusSummary | None:
    """Summary of the complete corpus at `destination`, None if there is nothing.

    Raises:
        ValueError: there is something else, or a corpus that was changed or of another vocabulary.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    remedy = "remove it or choose another folder"
    if not (destination / SUMMARY_NAME).is_file():
        raise ValueError(f"{destination.absolute()}: exists and is not a corpus; {remedy}")
    summary = read_summary(destination)
    if summary.vocab_size != vocab_size:
        raise ValueError(
            f"{destination.absolute()}: holds a corpus with vocab_size={summary.vocab_size}, not "
            f"{vocab_size}; {remedy}"
        )
    sources = {split.source for split in summary.splits}
    if _fingerprint(destination, sources) != summary.fingerprint:
        raise ValueError(f"{destination.absolute()}: changed since it was built; {remedy}")
    return summary


def read_summary(corpus: Path) -> CorpusSummary:
    """What corpus.json says."""
    fields = json.loads((corpus / SUMMARY_NAME).read_text())
    splits = tuple(SplitSummary(**split) for split in fields.pop("splits"))
    return CorpusSummary(**fields, destination=str(corpus), splits=splits)


def write_summary(corpus: Path, summary: CorpusSummary) -> None:
    """Write corpus.json, whole or not at all."""
    fields = asdict(summary)
    del fields["destination"]  # a corpus may be moved
    partial = corpus / f"{SUMMARY_NAME}.partial"
    partial.write_text(json.dumps(fields, indent=1) + "\n")
    partial.replace(corpus / SUMMARY_NAME)


def build_corpus(
    destination: Path,
    sources: Mapping[str, Iterable[Document]],
    *,
    vocab_size: int,
    skipped: Counter[str],
    progress: bool,
) -> CorpusSummary:
    """Build a corpus of the given documents at `destination`, which is missing or empty.

    Documents are sorted by key and equal texts kept once, so equal documents give equal bytes.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{destination.name}-", dir=destination.parent
    ) as folder:
        work = Path(folder) / "corpus"
        work.mkdir()
        documents = {
            (name, split): part
            for name, source in sources.items()
            for split, part in _split(_collect(name, source, skipped, progress)).items()
        }
        train = [d.text for (_, split), part in documents.items() if split == "train" for d in part]
        train_tokenizer(train, vocab_size, progress, length=len(train)).save(
            str(work / "tokenizer.json")
        )
        manifests = [
            _write(
                part,
                work / name / split,
                work / "tokenizer.json",
                vocab_size=vocab_size,
                progress=progress,
            )
            for (name, split), part in documents.items()
        ]
        summary = summarize(work, destination, manifests, skipped)
        write_summary(work, summary)
        work.rename(destination)
    return summary


def _collect(
    name: str, source: Iterable[Document], skipped: Counter[str], progress: bool
) -> list[Document]:
    """Documents sorted by key, the first of equal texts only."""
    by_text: dict[str, Document] = {}
    bar = tqdm(source, desc=f"read {name}", unit=" files", disable=not progress)
    for document in sorted(bar, key=lambda document: document.key):
        if by_text.setdefault(document.text, document) is not document:
            skipped["same text"] += 1
    return list(by_text.values())


def _split(documents: list[Document]) -> dict[str, list[Document]]:
    """Hold out the documents with the smallest hashes of their keys.

    2 %, but at least 32, so that an evaluation sees different ones, and never over a quarter.
    """
    ranked = sorted(documents, key=lambda d: blake2b(d.key.encode(), digest_size=8).digest())
    wanted = max(_MIN_HELD_OUT, len(ranked) // _HELD_OUT_ONE_IN)
    held_out = {d.key for d in ranked[: min(wanted, len(ranked) // 4)]}
    return {
        "train": [d for d in documents if d.key not in held_out],
        "validation": [d for d in documents if d.key in held_out],
    }


def _write(
    documents: list[Document],
    folder: Path,
    tokenizer: Path,
    *,
    vocab_size: int,
    progress: bool,
) -> Manifest:
    """Encode and write one split; the folder is SOURCE/SPLIT."""
    source, split = folder.parent.name, folder.name
    encoded = encode(
        [document.text for document in documents],
        tokenizer,
        description=f"encode {source}/{split}",
        progress=progress,
    )
    bar = tqdm(documents, f"write {source}/{split}", unit=" documents", disable=not progress)
    samples = (
        Sample(
            key=document.key,
            metadata={"title": document.title},
            text=document.text,
            tokens=row["tokens"].astype(np.uint32),
        )
        for document, row in zip(bar, encoded, strict=True)
    )
    return write_split(
        folder,
        samples,
        source=source,
        split=split,
        tokenizer_sha256=file_sha256(tokenizer, key="tokenizer"),
        vocab_size=vocab_size,
    )


def summarize(
    corpus: Path,
    destination: Path,
    manifests: Sequence[Manifest],
    skipped: Mapping[str, int],
    before: CorpusSummary | None = None,
) -> CorpusSummary:
    """Describe a corpus.

    Args:
        corpus: where its folders are now.
        destination: where they will be.
        manifests: of the sources that are new in it.
        skipped: what was left out of them.
        before: the corpus without them; None: they are all.
    """
    splits = before.splits if before else ()
    splits += tuple(
        SplitSummary(
            source=manifest.source,
            split=manifest.split,
            documents=manifest.samples,
            tokens=manifest.tokens,
            shards=len(manifest.shards),
        )
        for manifest in manifests
    )
    return CorpusSummary(
        destination=str(destination),
        fingerprint=_fingerprint(corpus, {split.source for split in splits}),
        vocab_size=manifests[0].vocab_size,
        splits=splits,
        skipped=dict(sorted({**(before.skipped if before else {}), **skipped}.items())),
    )


def _fingerprint(corpus: Path, sources: set[str]) -> str:
    return corpus_fingerprint({name: corpus / name for name in sources}, corpus / "tokenizer.json")
