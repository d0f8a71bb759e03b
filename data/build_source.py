"""Builds one source of a corpus from what people have; `mneme data build DEST` calls this.

    .DEST-building/NAME/request.json    what is being built; another request is refused
                        tokenizer.json  a copy, or newly trained
                        tables/         Arrow files of `datasets`
                        chunks/000000/  finished chunks (`data.build_chunk`)
                        result/         put together from them: a corpus, or one more source of it

A new corpus appears by renaming `result`. A further source is moved into the corpus, and is there
once DEST/corpus.json, which is replaced last, names it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.build import SUMMARY_NAME, CorpusSummary, read_summary, summarize, write_summary
from data.build_chunk import ChunkJob
from data.build_chunks import Plan, plan_chunks, write_chunks
from data.build_folder import IMPORT_NAME, building, check_request, collect
from data.importers.drafts import Draft, Importer, is_held_out
from data.manifest import Manifest, file_sha256, split_folders
from data.tokenizer import hugging_face, read_vocabulary, train_tokenizer

TOKENIZER_SAMPLE_BYTES = 256 * 2**20
"""Text that a new tokenizer learns from at most: of every chunk the beginning, in equal shares."""
_TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRequest:
    """What to build. All of it decides the bytes; another request is another build."""

    source: str
    """Name of the source: a folder below the corpus."""
    inputs: dict[str, Any]
    """Options that say what is imported and how, as they were typed."""
    tokenizer: Path | None
    """File to use; None: the corpus' own, or a new one."""
    vocab_size: int | None
    """Of a new tokenizer."""
    held_out: float
    """Share of the documents for validation; 0: a source without splits."""
    shard_megabytes: int
    limit: int | None
    """Files or rows to take; None: all."""

    def plain(self) -> dict[str, Any]:
        """For JSON: option -> value; the tokenizer by its hash."""
        fields = asdict(self)
        fields["tokenizer"] = self.tokenizer and _sha256(self.tokenizer)
        return {**fields.pop("inputs"), **fields}

    @property
    def max_bytes(self) -> int:
        """Of a chunk of the inputs, and of a shard."""
        return self.shard_megabytes * 2**20


def build_source(
    destination: Path,
    request: SourceRequest,
    open_importer: Callable[[Path], Importer],
    *,
    processes: int,
    progress: bool,
) -> CorpusSummary:
    """Add a source to the corpus at `destination`, or make the corpus with it.

    A build that was interrupted goes on; one that is finished returns at once.

    Args:
        destination: folder of the corpus; missing or empty for a new one.
        request: what to build.
        open_importer: lists the inputs; takes a folder for large tables.
        processes: that work on chunks; the result does not depend on it.
        progress: show bars on stderr.

    Raises:
        ValueError: the request does not fit what is there, or the inputs cannot be imported.
    """
    check_destination(destination, request)
    with building(destination, request.source) as work:
        found = _finished(destination, request)
        if found is not None:
            return found
        check_request(work, request.plain())
        importer = open_importer(work / "tables")
        plan = plan_chunks(importer, max_bytes=request.max_bytes, limit=request.limit)
        if not plan.chunks:
            raise ValueError(f"--source={request.source}: no files or rows to import there")
        check_request(work, {"inputs": plan.digest})
        texts = _sample_texts(importer, plan, request.held_out)
        tokenizer = _tokenizer(destination, work, request, texts, progress)
        job = ChunkJob(
            importer=importer,
            source=request.source,
            folder=work / "chunks",
            tokenizer=tokenizer,
            tokenizer_sha256=_sha256(tokenizer),
            vocabulary=read_vocabulary(tokenizer),
            held_out=request.held_out,
            max_shard_bytes=request.max_bytes,
        )
        write_chunks(job, plan.chunks, processes=processes, progress=progress)
        if not (destination / request.source).exists():
            collect(job, work / "result" / request.source, request.plain())
        return _commit(destination, work, request.source)


def check_destination(destination: Path, request: SourceRequest) -> None:
    """Whether the source may be built there.

    Raises:
        ValueError: names every rule that is broken.
    """
    problems = []
    if (destination / SUMMARY_NAME).is_file():
        problems = _tokenizer_problems(destination, request)
    elif destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        problems.append(
            f"{destination}: exists and is not a corpus; remove it or choose another folder"
        )
    if not destination.exists() and request.tokenizer is None and request.vocab_size is None:
        problems.append(
            "--tokenizer: a new corpus needs one; give --tokenizer FILE, or --vocab-size N to train "
            "one on the text"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _tokenizer_problems(destination: Path, request: SourceRequest) -> list[str]:
    """What does not fit the tokenizer that the corpus has."""
    tokenizer = destination / _TOKENIZER_NAME
    size = read_vocabulary(tokenizer).size
    problems = []
    if request.vocab_size not in (None, size):
        problems.append(
            f"--vocab-size={request.vocab_size}: {tokenizer} has {size} tokens; leave the option out"
        )
    if request.tokenizer is not None and _sha256(request.tokenizer) != _sha256(tokenizer):
        problems.append(
            f"--tokenizer={request.tokenizer}: {tokenizer} is another; leave the option out, or "
            "build another corpus"
        )
    return problems


def _finished(destination: Path, request: SourceRequest) -> CorpusSummary | None:
    """The corpus if it has the source.

    Raises:
        ValueError: there is a source of this name that was built otherwise.
    """
    folder = destination / request.source
    if not folder.exists():
        return None
    path = folder / IMPORT_NAME
    there = json.loads(path.read_text())["request"] if path.is_file() else None
    if there != json.loads(json.dumps(request.plain())):
        raise ValueError(
            f"--source={request.source}: {folder} was built from something else or with other "
            "options; use another name"
        )
    summary = read_summary(destination)
    there = request.source in {split.source for split in summary.splits}
    return summary if there else None


def _tokenizer(
    destination: Path,
    work: Path,
    request: SourceRequest,
    texts: Iterator[str],
    progress: bool,
) -> Path:
    """The tokenizer file of this build, made if it is not there yet; `texts` are to learn from.

    Raises:
        ValueError: the corpus got another tokenizer since this build began.
    """
    path, given = work / _TOKENIZER_NAME, destination / _TOKENIZER_NAME
    if not given.is_file() and request.tokenizer is not None:
        given = request.tokenizer
    if path.is_file():
        if given.is_file() and _sha256(path) != _sha256(given):
            raise ValueError(
                f"{work}: half built with another tokenizer than {given}; remove that folder"
            )
        return path
    partial = path.with_suffix(".partial")
    if given.is_file():
        shutil.copyfile(given, partial)
    else:
        assert request.vocab_size is not None  # by check_destination
        with hugging_face(progress):
            train_tokenizer(texts, request.vocab_size, progress).save(str(partial))
    partial.rename(path)
    return path


def _sample_texts(importer: Importer, plan: Plan, held_out: float) -> Iterator[str]:
    """Texts that are not held out, at most TOKENIZER_SAMPLE_BYTES of all."""
    share = TOKENIZER_SAMPLE_BYTES // len(plan.chunks)
    for chunk in plan.chunks:
        left = share
        for draft in importer.drafts(chunk.start, chunk.stop):
            if not isinstance(draft, Draft) or is_held_out(draft.key, held_out):
                continue
            for text in draft.parts:
                if text is not None:
                    yield text
                    left -= len(text.encode())
            if left <= 0:
                break


def _commit(destination: Path, work: Path, source: str) -> CorpusSummary:
    """Make the source part of the corpus; may be interrupted and called again."""
    result = work / "result"
    is_new = not (destination / SUMMARY_NAME).is_file()
    if is_new:
        corpus = result
        shutil.copyfile(work / _TOKENIZER_NAME, corpus / _TOKENIZER_NAME)
        before = None
    else:
        corpus = destination
        before = read_summary(destination)
        if not (destination / source).exists():
            (result / source).rename(destination / source)
    folder = corpus / source
    manifests = [Manifest.read(path, key=str(path)) for path in split_folders(folder).values()]
    about = json.loads((folder / IMPORT_NAME).read_text())
    skipped = {f"{source}: {cause}": number for cause, number in about["left_out"].items()}
    summary = summarize(corpus, destination, manifests, skipped, before)
    write_summary(corpus, summary)
    if is_new:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():
            destination.rmdir()  # it is empty
        result.rename(destination)
    return summary


def _sha256(path: Path) -> str:
    return file_sha256(path, key=str(path))
