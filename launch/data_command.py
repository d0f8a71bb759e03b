"""`mneme data …`: make corpora, index and check shards, count, convert."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launch.data_options import add_build_options, importer, imports_something, source_request

if TYPE_CHECKING:
    from data.build import CorpusSummary

_Run = Callable[[argparse.Namespace], int]
_QUICKSTART = {"quickstart": "v4_nano", "quickstart_mm": "v4_nano_mm"}
"""Corpus -> recipe to try it with."""
_PLACE = ("sample", "lane", "source", "shard", "key")
FOUND_PROBLEMS = 1
"""Exit code: what was asked for was done, and something is damaged."""


def add_data_actions(command: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = command.add_subparsers(metavar="ACTION", required=True)

    def add(run: _Run, purpose: str) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_")
        action = actions.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        action.set_defaults(run_data=run)
        return action

    action = add(_build, "make shards from files, or one more source of a corpus")
    action.add_argument(
        "destination",
        metavar="DEST",
        type=Path,
        help="folder of the corpus; alone: quickstart or quickstart_mm, a small corpus of what is "
        "installed, without or with pictures; niah: adds needles in haystacks to it",
    )
    action.add_argument("-o", "--output", type=Path, help="corpus of quickstart (default: corpus)")
    add_build_options(action)
    action = add(_index, "index shards that others wrote, and tokenise their text")
    action.add_argument("folder", metavar="DIR", type=Path, help="with the shards, NAME.tar")
    action.add_argument("--tokenizer", metavar="FILE", type=Path, required=True)
    action.add_argument("--source", metavar="NAME", help="default: name of the folder")
    action = add(_verify, "read every shard and name all that is not as it was written")
    action.add_argument("folder", metavar="DIR", type=Path, help="corpus, source or split")
    action.add_argument("--decode", action="store_true", help="decode images and clips, too; slow")
    action.add_argument("--json", action="store_true", help="answer as one JSON object")
    action = add(_stats, "count documents and tokens; or what a step of a run was trained on")
    action.add_argument(
        "folder", metavar="DIR", type=Path, help="corpus, source or split; with --step: a run"
    )
    action.add_argument("--step", type=int, help="name the documents of this step's batch")
    action.add_argument("--sample", type=int, help="of this sequence only; 0 is the first")
    action.add_argument("--json", action="store_true", help="answer as one JSON object")
    action = add(_convert, "turn a source into an IndexedDataset of megatron-core, or back")
    action.add_argument("source", metavar="SOURCE", type=Path, help="folder; or path without .idx")
    action.add_argument(
        "destination", metavar="DEST", type=Path, help="path without .idx; or folder"
    )
    action.add_argument("--to", choices=["megatron", "webdataset"], required=True)
    action.add_argument("--split", help="to megatron: train, validation or all (default: train)")
    action.add_argument("--tokenizer", type=Path, help="to webdataset: that the ids come from")


def run_data(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    run: _Run = options.run_data
    try:
        return run(options)
    except ImportError as error:  # PyAV, which is optional: the message says what to install
        raise ValueError(str(error)) from error


def _build(options: argparse.Namespace) -> int:
    if not imports_something(options):
        if str(options.destination) in _QUICKSTART:
            return _build_quickstart(options)
        if str(options.destination) == "niah":
            return _build_niah(options)
    request = source_request(options)
    from data.build_source import build_source  # noqa: PLC0415

    processes = options.processes or os.cpu_count() or 1
    opened = importer(request.inputs, processes=processes, progress=True)
    summary = build_source(options.destination, request, opened, processes=processes, progress=True)
    _print_source(options.destination, request.source, summary)
    return 0


def _build_quickstart(options: argparse.Namespace) -> int:
    name = str(options.destination)
    output = options.output or Path("corpus")
    if name == "quickstart":
        from data.build import build_quickstart_corpus  # noqa: PLC0415

        build_quickstart_corpus(output)
    else:
        from data.build_mm import build_quickstart_mm_corpus  # noqa: PLC0415

        build_quickstart_mm_corpus(output)
    print(f"corpus: {output}; next: mneme train {_QUICKSTART[name]}")
    return 0


def _build_niah(options: argparse.Namespace) -> int:
    from data.niah import build_niah  # noqa: PLC0415

    corpus = options.output or Path("corpus")
    for manifest in build_niah(corpus):
        print(f"{manifest.source}/{manifest.split}: {manifest.samples} documents")
    print(f"corpus: {corpus}; next: mneme ablate niah")
    return 0


def _print_source(corpus: Path, source: str, summary: "CorpusSummary") -> None:
    for split in summary.splits:
        if split.source == source:
            print(
                f"{source}/{split.split}: {split.documents} documents, {split.tokens} tokens, "
                f"{split.shards} shards"
            )
    causes = {
        name.removeprefix(f"{source}: "): number
        for name, number in summary.skipped.items()
        if name.startswith(f"{source}: ")
    }
    if causes:
        listed = ", ".join(f"{number} {cause}" for cause, number in causes.items())
        print(f"left out: {listed}; named in {corpus / source / 'left_out.jsonl'}")
    print(
        f"next, in a recipe: data.sources.{source}.path={corpus / source} and "
        f"data.tokenizer={corpus / 'tokenizer.json'} (vocabulary of {summary.vocab_size})"
    )


def _index(options: argparse.Namespace) -> int:
    from data.foreign import format_report, index_folder, read_report  # noqa: PLC0415
    from data.tars import CorruptShardError  # noqa: PLC0415

    try:
        manifest = index_folder(options.folder, tokenizer=options.tokenizer, source=options.source)
    except CorruptShardError as error:
        print(error, file=sys.stderr)
        return FOUND_PROBLEMS
    print(format_report(manifest, read_report(options.folder)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data.verify import format_problems, plain_problems, verify  # noqa: PLC0415

    problems = verify(options.folder, decode=options.decode)
    if options.json:
        print(json.dumps(plain_problems(problems), indent=2))
    else:
        print(format_problems(problems))
    return FOUND_PROBLEMS if problems else 0


def _stats(options: argparse.Namespace) -> int:
    if options.step is not None:
        return _step(options)
    if options.sample is not None:
        raise ValueError("--sample: is of a step; add --step T, and give a run directory")
    from data.stats import format_stats, plain_stats, stats  # noqa: PLC0415
    from data.tars import CorruptShardError  # noqa: PLC0415

    try:
        rows = stats(options.folder)
    except (CorruptShardError, FileNotFoundError) as error:
        print(f"{error}; mneme data verify {options.folder} names all of it", file=sys.stderr)
        return FOUND_PROBLEMS
    print(json.dumps(plain_stats(rows), indent=2) if options.json else format_stats(rows))
    return 0


def _step(options: argparse.Namespace) -> int:
    if not (options.folder / "recipe.yaml").is_file():
        raise ValueError(f"{options.folder}: holds no run (no recipe.yaml); --step is of a run")
    from train.locate import locate  # noqa: PLC0415

    places = [asdict(place) for place in locate(options.folder, options.step, options.sample)]
    if options.json:
        print(json.dumps({"step": options.step, "pieces": places}, indent=2))
        return 0
    print("sample  lane  source  shard  key  tokens")
    for p in places:
        tokens = f"{p['start']}..{p['stop']}"
        print("  ".join(map(str, (*(p[n] for n in _PLACE), tokens))))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from data.convert import to_megatron, to_webdataset  # noqa: PLC0415

    if options.to == "megatron":
        if options.tokenizer is not None:
            raise ValueError("--tokenizer: is for --to webdataset; leave it out")
        split = options.split or "train"
        number = to_megatron(options.source, options.destination, split=split, progress=True)
    else:
        if options.split is not None:
            raise ValueError("--split: is for --to megatron; leave it out")
        if options.tokenizer is None:
            raise ValueError("--tokenizer: needed for --to webdataset; give the tokenizer.json")
        number = to_webdataset(
            options.source, options.destination, tokenizer=options.tokenizer, progress=True
        )
    print(f"{number} documents: {options.destination}")
    return 0
