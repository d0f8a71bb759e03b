"""`mneme checkpoint …`: look into checkpoints, check their files, convert to and from Hugging Face."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.checkpoint.contents import Contents, Entry
    from train.checkpoint.manifest import Damage, HashCache

_Run = Callable[[argparse.Namespace], int]
FOUND_PROBLEMS = 1
"""Exit code: what was asked for was done, and something is damaged."""
_META = ("step", "tokens", "world_size", "only_weights", "corpus")


def add_checkpoint_actions(command: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = command.add_subparsers(metavar="ACTION", required=True, dest="action")

    def add(name: str, run: _Run, purpose: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        action.set_defaults(run_checkpoint=run)
        return action

    action = add("inspect", _inspect, "list what a checkpoint holds; reads no tensor")
    _add_source(action, "run directory (its newest checkpoint), or one checkpoint of it")
    action.add_argument(
        "--match", metavar="GLOB", default="*", help="names, such as 'model.*norm*'"
    )
    action.add_argument("--json", action="store_true", help="answer as one JSON object")
    action = add("verify", _verify, "read every file and name all that is not as it was written")
    _add_source(action, "run directory (all its checkpoints), or one checkpoint of it")
    action.add_argument("--json", action="store_true", help="answer as one JSON object")
    purpose = "make a run that starts from the weights of a folder of safetensors"
    action = add("import-hf", _import_hf, purpose)
    action.add_argument("source", metavar="SOURCE", type=Path, help="folder with config.json")
    action.add_argument("destination", metavar="DESTINATION", type=Path, help="new run directory")
    action.add_argument("--recipe", help="what to train them with; default: say so on resume")
    action.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="such as train.steps=200"
    )
    action = add("export-hf", _export_hf, "write a checkpoint as a folder that transformers loads")
    _add_source(action, "run directory, or one checkpoint of it")
    action.add_argument("destination", metavar="DESTINATION", type=Path, help="new folder")
    action.add_argument("--dtype", choices=["bf16", "fp32"], help="default: as it is stored")
    action.add_argument("--max-shard-size", default="5GB", help="of a file (default: 5GB)")


def run_checkpoint(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    run: _Run = options.run_checkpoint
    return run(options)


def _add_source(action: argparse.ArgumentParser, purpose: str) -> None:
    action.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help=purpose)


def _checkpoints(source: Path) -> list[Path]:
    """What a user means by a run or one of its checkpoints, oldest first.

    Raises:
        ValueError: there is no checkpoint.
    """
    from train.checkpoint.commit import complete_checkpoints  # noqa: PLC0415

    named = source.name.startswith("step-") and source.is_dir()
    if named or (source / "checkpoint.json").is_file():
        return [source]
    found = [path for _, path in complete_checkpoints(source)]
    if not found:
        raise ValueError(
            f"{source}: holds no checkpoint; give a run directory, or one checkpoints/step-N of it"
        )
    return found


def _verify(options: argparse.Namespace) -> int:
    from train.checkpoint.manifest import verify  # noqa: PLC0415

    hashes: HashCache = {}
    found = {path: verify(path, hashes) for path in _checkpoints(options.source)}
    if options.json:
        rows = [
            {"path": str(path), "damaged": [asdict(damage) for damage in damages]}
            for path, damages in found.items()
        ]
        print(json.dumps({"whole": not any(found.values()), "checkpoints": rows}, indent=2))
    else:
        for path, damages in found.items():
            _print_verdict(path, damages)
    return FOUND_PROBLEMS if any(found.values()) else 0


def _print_verdict(checkpoint: Path, damages: Sequence["Damage"]) -> None:
    from train.checkpoint.manifest import read_manifest  # noqa: PLC0415

    if damages:
        print(f"{checkpoint}: damaged")
        for damage in damages:
            print(f"  {damage.kind:<8} {damage.detail}")
        return
    files = read_manifest(checkpoint).files
    print(f"{checkpoint}: whole, {len(files)} files, {_size(sum(file.size for file in files))}")


def _inspect(options: argparse.Namespace) -> int:
    checkpoint = _checkpoints(options.source)[-1]
    from train.checkpoint.contents import read_contents  # noqa: PLC0415 - needs torch

    contents = read_contents(checkpoint)
    chosen = [entry for entry in contents.entries if fnmatchcase(entry.name, options.match)]
    if not chosen:
        raise ValueError(f"--match {options.match}: no name in {checkpoint} is like this")
    if options.json:
        print(json.dumps(_as_json(contents, chosen), indent=2))
    else:
        _print_contents(contents, chosen)
    return 0


def _as_json(contents: "Contents", chosen: Iterable["Entry"]) -> dict[str, Any]:
    totals = {kind: {"entries": n, "bytes": size} for kind, (n, size) in contents.totals().items()}
    return {
        "path": str(contents.path),
        **{key: contents.meta[key] for key in _META},
        "tensors": [asdict(entry) for entry in chosen],
        "totals": totals,
        "engram": {"files": contents.table_files, "bytes": contents.table_bytes},
    }


def _print_contents(contents: "Contents", chosen: Sequence["Entry"]) -> None:
    meta = contents.meta
    print(f"{contents.path}: step {meta['step']}, {meta['tokens']:,} tokens")
    if meta["only_weights"]:
        print("  imported: weights only")
    else:
        print(f"  saved by {meta['world_size']} ranks; corpus {meta['corpus'][:12]}")
    print()
    _print_table(
        ("name", "shape", "type", "size"),
        [(e.name, _shape(e.shape), e.dtype or "-", _size(e.bytes)) for e in chosen],
    )
    if len(chosen) < len(contents.entries):
        print(f"({len(chosen)} of {len(contents.entries)} names)")
    print()
    totals = contents.totals().items()
    _print_table(
        ("in all", "names", "size"), [(kind, str(n), _size(size)) for kind, (n, size) in totals]
    )
    if contents.table_files:
        print(f"engram: the rows that ever changed, in {contents.table_files} files")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In columns, the last one to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        print("  ".join([*cells, row[-1].rjust(widths[-1])]))


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "-"
    return " x ".join(map(str, shape)) or "number"


def _size(number: int) -> str:
    size, units = float(number), iter(("B", "KB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while size >= 1000 and unit != "PB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _import_hf(options: argparse.Namespace) -> int:
    from launch.checkpoint import import_hf  # noqa: PLC0415

    return import_hf(
        options.source, options.destination, recipe=options.recipe, overrides=options.overrides
    )


def _export_hf(options: argparse.Namespace) -> int:
    from launch.checkpoint import export_hf  # noqa: PLC0415

    return export_hf(
        options.source,
        options.destination,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
