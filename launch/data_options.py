"""Checks what `mneme data build DEST --source …` was given, all of it before any work starts."""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.build_source import SourceRequest
    from data.importers.drafts import Importer

_FOLDERS = ("text", "images", "videos")
_GLOBS = ("jsonl", "parquet", "obelics", "mmc4")
INPUTS = (*_FOLDERS, *_GLOBS, "hf")
_APPLIES = {
    "text_key": ("jsonl", "parquet", "hf"),
    "id_key": ("jsonl", "parquet", "hf", "obelics", "mmc4"),
    "hf_split": ("hf",),
    "hf_config": ("hf",),
    "extensions": ("text",),
    "image_root": ("obelics", "mmc4"),
    "clip_seconds": ("videos",),
}
_DEFAULTS: dict[str, Any] = {"text_key": "text", "hf_split": "train", "extensions": []}
_MEDIA = ("images", "videos", "obelics", "mmc4")
_SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def add_build_options(command: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = command.add_argument_group("what to import, one of")
    group.add_argument("--text", metavar="DIR", help="a document for each file below")
    group.add_argument("--jsonl", metavar="GLOB", help="JSON Lines, compressed or not")
    group.add_argument("--parquet", metavar="GLOB", help="Parquet files")
    group.add_argument(
        "--hf", metavar="NAME_OR_PATH", help="dataset of the hub, of save_to_disk, or a folder"
    )
    group.add_argument("--images", metavar="DIR", help="pictures with captions beside them")
    group.add_argument("--videos", metavar="DIR", help="videos with captions beside them")
    group.add_argument("--obelics", metavar="GLOB", help="rows with the lists texts and images")
    group.add_argument("--mmc4", metavar="GLOB", help="rows with text_list and image_info")
    group = command.add_argument_group("how")
    group.add_argument("--source", metavar="NAME", help="of the source: a folder of the corpus")
    group.add_argument("--tokenizer", metavar="FILE", type=Path, help="a tokenizer.json")
    group.add_argument("--vocab-size", metavar="N", type=int, help="train a tokenizer of this size")
    group.add_argument("--text-key", help="column with the text (default: text)")
    group.add_argument("--id-key", help="column with an id (default: rows are numbered)")
    group.add_argument("--hf-split", help="split of the dataset (default: train)")
    group.add_argument("--hf-config", help="configuration of the dataset")
    group.add_argument("--extensions", help="files to take, such as py,md (default: all)")
    group.add_argument("--image-root", metavar="DIR", type=Path, help="where documents' images lie")
    group.add_argument("--clip-seconds", type=float, help="cut longer videos into such clips")
    group.add_argument(
        "--held-out",
        type=float,
        default=0.01,
        help="share for validation (default: 0.01); 0: a source without splits",
    )
    group.add_argument(
        "--shard-megabytes", type=int, default=256, help="of a shard, and of a unit of work"
    )
    group.add_argument("--processes", type=int, help="default: one per core")
    group.add_argument("--limit", metavar="N", type=int, help="take this many files or rows")


def imports_something(options: argparse.Namespace) -> bool:
    """Whether any input is given, or a name for it."""
    return options.source is not None or any(getattr(options, name) is not None for name in INPUTS)


def source_request(options: argparse.Namespace) -> "SourceRequest":
    """What to build.

    Raises:
        ValueError: names everything that is wrong.
    """
    problems = list(_problems(options))
    if problems:
        raise ValueError("\n".join(problems))
    from data.build_source import SourceRequest, check_destination  # noqa: PLC0415

    [kind] = [name for name in INPUTS if getattr(options, name) is not None]
    inputs: dict[str, Any] = {kind: _absolute(kind, getattr(options, kind))}
    for name, kinds in _APPLIES.items():
        value = getattr(options, name)
        if kind in kinds:
            inputs[name] = _DEFAULTS.get(name) if value is None else value
    if options.extensions:
        inputs["extensions"] = sorted(e.strip().lstrip(".") for e in options.extensions.split(","))
    if options.image_root:
        inputs["image_root"] = str(options.image_root.absolute())
    request = SourceRequest(
        source=options.source,
        inputs=inputs,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        held_out=options.held_out,
        shard_megabytes=options.shard_megabytes,
        limit=options.limit,
    )
    check_destination(options.destination, request)
    _check_media(options, kind)
    return request


def importer(
    inputs: dict[str, Any], *, processes: int, progress: bool
) -> "Callable[[Path], Importer]":
    """What opens the inputs of a request; takes a folder for large tables."""
    from data.importers import open_importer  # noqa: PLC0415

    return lambda tables: open_importer(inputs, tables, processes=processes, progress=progress)


def _absolute(kind: str, value: str) -> str:
    """So that a build is known again from another folder; a name of the hub stays one."""
    return value if kind == "hf" and not Path(value).exists() else str(Path(value).absolute())


def _problems(options: argparse.Namespace) -> Iterator[str]:
    given = [name for name in INPUTS if getattr(options, name) is not None]
    if len(given) != 1:
        there = " and ".join(f"--{name}" for name in given) or "nothing"
        yield f"{there}: give one input, of {', '.join(f'--{name}' for name in INPUTS)}"
    if options.source is None:
        yield "--source: needed; give the source a name, such as --source books"
    elif not _SOURCE_NAME.fullmatch(options.source):
        yield f"--source={options.source}: use letters, digits, - and _ only"
    for name in given:
        yield from _missing(name, getattr(options, name))
    yield from _inapplicable(options, given)
    yield from _numbers(options)
    yield from _tokenizer(options)


def _missing(name: str, value: str) -> Iterator[str]:
    from data.importers.media import require_video  # noqa: PLC0415
    from data.importers.tables import matching_files  # noqa: PLC0415

    if name in _FOLDERS and not Path(value).is_dir():
        yield f"--{name}={value}: no such folder; give one"
    if name in _GLOBS and not matching_files(value):
        yield f"--{name}={value}: no such files; quote the pattern, such as --{name} 'in/*.{name}'"
    if name == "videos":
        try:
            require_video()
        except ValueError as error:
            yield str(error)


def _inapplicable(options: argparse.Namespace, given: list[str]) -> Iterator[str]:
    for name, kinds in _APPLIES.items():
        if getattr(options, name) is not None and given and not set(kinds) & set(given):
            yield (
                f"--{name.replace('_', '-')}: is for {', '.join(f'--{kind}' for kind in kinds)}; "
                "leave it out"
            )
    if options.output is not None:
        yield "--output: is for quickstart; the corpus goes to DEST"
    if options.image_root is not None and not options.image_root.is_dir():
        yield f"--image-root={options.image_root}: no such folder; give one"
    if "mmc4" in given and options.image_root is None:
        yield "--image-root: needed for --mmc4; give the folder with the images"


def _numbers(options: argparse.Namespace) -> Iterator[str]:
    if not 0 <= options.held_out < 1:
        yield f"--held-out={options.held_out}: a share from 0 to below 1; use 0.01"
    for name in ("shard_megabytes", "processes", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            yield f"--{name.replace('_', '-')}={value}: must be 1 or more"
    if options.clip_seconds is not None and not options.clip_seconds > 0:
        yield f"--clip-seconds={options.clip_seconds}: must be above 0"


def _tokenizer(options: argparse.Namespace) -> Iterator[str]:
    from data.tokenizer import SMALLEST_VOCABULARY, read_vocabulary  # noqa: PLC0415

    if options.tokenizer is not None and options.vocab_size is not None:
        yield "--tokenizer and --vocab-size: one of both; the latter trains a new tokenizer"
    if options.vocab_size is not None and options.vocab_size < SMALLEST_VOCABULARY:
        yield f"--vocab-size={options.vocab_size}: use {SMALLEST_VOCABULARY} or more"
    if options.tokenizer is not None:
        try:
            read_vocabulary(options.tokenizer)
        except ValueError as error:
            yield f"--tokenizer={error}"


def _check_media(options: argparse.Namespace, kind: str) -> None:
    """A tokenizer that can mark images, where there will be some."""
    from data.tokenizer import RESERVED, read_vocabulary  # noqa: PLC0415

    own = options.destination / "tokenizer.json"
    path = own if own.is_file() else options.tokenizer
    if kind in _MEDIA and path is not None and read_vocabulary(path).media is None:
        raise ValueError(
            f"--{kind}: {path} has no special token for the place of an image; add one named "
            f"{RESERVED}"
        )
