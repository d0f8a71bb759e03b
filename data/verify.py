"""`mneme data verify`: compares a corpus, a source or a split with its manifests, byte for byte.

It finds all that is wrong and stops at nothing. What it reads again and again is named by
`data.reader` while training, too; what nothing reads (a header, a hash) is named only here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.index import INDEX_SUFFIX, TOKENS_SUFFIX
from data.manifest import MANIFEST_NAME, SPLITS, Manifest, corpus_fingerprint, file_sha256
from data.processes import work_through
from data.tars import printable
from data.verify_shard import RESTORE, Problem, ShardCheck, check_shard

__all__ = ["Problem", "format_problems", "plain_problems", "verify"]

CORPUS_NAME, TOKENIZER_NAME = "corpus.json", "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A folder with a manifest."""

    folder: Path
    name: str
    """Below the folder that was asked for, for people."""


def verify(folder: Path, *, decode: bool = False, progress: bool = True) -> list[Problem]:
    """Read every shard once and report all that is not as it was written.

    Args:
        folder: a corpus (several sources), a source, or one split of a source.
        decode: decode images and clips, too; slow.
        progress: show a progress bar on stderr.

    Returns:
        Problems in the order of the shards; none: all is well.

    Raises:
        ValueError: there is nothing to verify.
        ImportError: `decode`, and PyAV is missing for a clip.
    """
    parts = find_parts(folder)
    if not parts:
        raise ValueError(
            f"{folder}: has no {MANIFEST_NAME}, nor have its folders; give a folder that `mneme data "
            "build` or `mneme data index` made"
        )
    problems = list(_missing_parts(folder, parts))
    checks: list[ShardCheck] = []
    for part in parts:
        try:
            manifest = Manifest.read(part.folder, key=part.name)
        except ValueError as error:
            problems.append(Problem(part.name, MANIFEST_NAME, "", str(error), RESTORE))
            continue
        problems += _check_folder(part, manifest)
        rest = replace(manifest, shards=())
        checks += [
            ShardCheck(folder=part.folder, manifest=rest, entry=entry, decode=decode)
            for entry in manifest.shards
        ]
    sizes = [check.entry.bytes for check in checks]
    for found in work_through(
        check_shard, checks, sizes, description=f"verify {folder}", progress=progress
    ):
        problems += found
    return problems


def find_parts(folder: Path) -> list[Part]:
    """Folders with a manifest: the given one, or up to two levels below it."""
    patterns = (MANIFEST_NAME, f"*/{MANIFEST_NAME}", f"*/*/{MANIFEST_NAME}")
    found = [path.parent for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [Part(path, path.relative_to(folder.parent).as_posix()) for path in sorted(found)]


def format_problems(problems: Sequence[Problem]) -> str:
    """Lines for people. Names in shards are data: what is no letter is written as an escape."""
    if not problems:
        return "every shard is as it was written"
    lines = [f"{len(problems)} problems"]
    for p in problems:
        place = ", ".join(
            f"{what} {printable(name)}"
            for what, name in (("source", p.source), ("shard", p.shard), ("key", p.key))
            if name
        )
        lines.append(f"  {place}: {printable(p.problem)}; {printable(p.fix)}")
    return "\n".join(lines)


def plain_problems(problems: Sequence[Problem]) -> dict[str, Any]:
    """For `--json`."""
    return {"ok": not problems, "problems": [asdict(problem) for problem in problems]}


def _missing_parts(folder: Path, parts: Sequence[Part]) -> Iterator[Problem]:
    """Compare with the corpus' summary; a source has both splits or none."""
    found = {part.folder for part in parts}
    wanted: set[Path] = set()
    summary = folder / CORPUS_NAME
    if summary.is_file():
        try:
            fields = json.loads(summary.read_bytes())
            sources = {split["source"] for split in fields["splits"]}
            wanted = {_split_folder(folder, s["source"], s["split"]) for s in fields["splits"]}
            yield from _check_fingerprint(folder, sources, fields["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            text = f"cannot be read: {error!r}"
            yield Problem("", CORPUS_NAME, "", text, "build the corpus again")
    for path in found:
        if path.name in SPLITS and path != folder:
            wanted |= {path.parent / split for split in SPLITS}
    for path in sorted(wanted - found):
        source, split = (path.parent.name, path.name) if path.name in SPLITS else (path.name, "all")
        yield Problem(source, MANIFEST_NAME, "", f"split {split} has no manifest", RESTORE)


def _split_folder(corpus: Path, source: str, split: str) -> Path:
    return corpus / source / split if split in SPLITS else corpus / source


def _check_fingerprint(folder: Path, sources: set[str], expected: str) -> Iterator[Problem]:
    try:
        paths = {name: folder / name for name in sources}
        found = corpus_fingerprint(paths, folder / TOKENIZER_NAME)
    except ValueError as error:
        yield Problem("", CORPUS_NAME, "", str(error), RESTORE)
        return
    if found != expected:
        text = (
            f"fingerprint {found} of manifests and tokenizer is not the {expected} that was built"
        )
        yield Problem("", CORPUS_NAME, "", text, RESTORE)


def _check_folder(part: Part, manifest: Manifest) -> Iterator[Problem]:
    """Files that no shard of the manifest has, and a tokenizer that is not its own."""
    names = {shard.name for shard in manifest.shards}
    for path in sorted(part.folder.iterdir()):
        tar = path.name.removesuffix(INDEX_SUFFIX).removesuffix(TOKENS_SUFFIX)
        if tar.endswith(".tar") and tar not in names:
            text = "is not in the manifest: nothing reads it"
            fix = "remove it, or index the folder again"
            yield Problem(manifest.source, path.name, "", text, fix)
    for folder in list(part.folder.parents)[:2]:
        tokenizer = folder / TOKENIZER_NAME
        if (folder / CORPUS_NAME).is_file() and tokenizer.is_file():
            if file_sha256(tokenizer, key=str(tokenizer)) != manifest.tokenizer_sha256:
                text = f"token ids are not of {tokenizer}"
                yield Problem(manifest.source, MANIFEST_NAME, "", text, RESTORE)
            break
