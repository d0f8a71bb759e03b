"""Which row of Engram's tables means what: kept with a checkpoint, compared before it is read.

A row is found by hashing tokens. With other primes, multipliers or token ids the same n-gram finds
another row, and nothing would look wrong: so what the hash depends on is written down, by every key
of the recipe, and as the numbers that follow from them. No torch: the launcher compares the keys, the
ranks all of it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.memory_rules import tables_in_host_memory

Geometry = dict[str, dict[str, Any]]
"""`recipe`: key -> value; `hash`: what follows from these and the tokenizer, name -> value."""

FRESH = "checkpoint.unfit_tables=fresh"
"""Typed by who resumes with other tables."""
_RESHAPING = tuple(
    f"model.engram.{key}" for key in ("layers", "ngram_orders", "num_heads", "head_dim")
)
"""Keys that the shapes of the model's own parameters depend on, too."""
_FILE = Path("engram", "geometry.json")
"""In a checkpoint, beside the files of `parallel.engram_chain`."""
_STORAGE = "parallel.engram.storage"
_PLACES = {"device": "device", "host": "memory, shared or mmap"}
"""Where rows are, and what to type for it."""
_SHOWN = 60


def recipe_geometry(config: RunConfig) -> Geometry:
    """What a recipe with Engram says, without its tokenizer."""
    engram, host = config.model.engram, tables_in_host_memory(config)
    assert engram is not None, "a model without tables"
    keys = (
        "layers",
        "ngram_orders",
        "num_heads",
        "head_dim",
        "rows_per_head",
        "seed",
        "pad_token_id",
    )
    recipe = {f"model.engram.{key}": getattr(engram, key) for key in keys}
    recipe[_STORAGE] = "host" if host else "device"
    if host:
        recipe["parallel.engram.dtype"] = config.parallel.engram.dtype
        recipe["optim.engram_optimizer"] = config.optim.engram_optimizer
    plain: Geometry = json.loads(json.dumps({"recipe": recipe, "hash": {}}))
    return plain


def merge(parts: Iterable[Geometry]) -> Geometry:
    """What all ranks know together."""
    whole: Geometry = {"recipe": {}, "hash": {}}
    for part in parts:
        for kind, values in part.items():
            whole[kind] |= values
    return whole


def write_geometry(checkpoint: Path, geometry: Geometry) -> None:
    """Write it into a checkpoint that is not yet committed."""
    path = checkpoint / _FILE
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        json.dump(geometry, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())


def read_geometry(checkpoint: Path) -> Geometry | None:
    """Read that of a checkpoint; None where nothing is known of tables.

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoint / _FILE
    if not path.is_file():
        return None
    try:
        found: Geometry = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": dict(found["recipe"]), "hash": dict(found["hash"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def differences(checkpoint: Path, config: RunConfig, now: Geometry) -> dict[str, str]:
    """By key of the recipe, or by name: why rows that were saved are not those of the recipe.

    What follows from keys that differ is left out.

    Args:
        checkpoint: a committed one.
        config: of today.
        now: its geometry, or that of the recipe only.

    Raises:
        ValueError: what the checkpoint says is damaged.
    """
    saved = read_geometry(checkpoint)
    if saved is None:
        return {"": f"{checkpoint / _FILE}: missing; the checkpoint knows of no Engram tables"}
    recipe, old = now["recipe"], saved["recipe"]
    where = old.get(_STORAGE)
    if recipe[_STORAGE] != where:
        typed = config.parallel.engram.storage
        use = _PLACES.get(str(where), "that of the run")
        return {_STORAGE: f"{_STORAGE}={typed}: the checkpoint's tables are elsewhere; use {use}"}
    found = {
        key: f"{key}={_show(value)}: the checkpoint's tables have {_show(old.get(key))}; use "
        f"{key}={_show(old.get(key))}"
        for key, value in recipe.items()
        if old.get(key) != value
    }
    if any(key.startswith("model") for key in found):
        return found
    return found | hash_differences(saved, now["hash"])


def hash_differences(saved: Geometry, now: Mapping[str, Any]) -> dict[str, str]:
    """Why rows are found elsewhere, by name."""
    return {
        name: f"{name}: {_show(value)}, and {_show(saved['hash'].get(name))} in the checkpoint"
        for name, value in now.items()
        if saved["hash"].get(name) != value
    }


def refusal(found: Mapping[str, str], config: RunConfig, run_dir: Path) -> list[str]:
    """What to tell who wants to go on with tables that differ; nothing, if fresh ones are wanted.

    Args:
        found: the differences; if there are none, nothing is told.
        config: of today.
        run_dir: of the run.
    """
    if not found:
        return []
    lines = list(found.values())
    if not found.keys().isdisjoint(_RESHAPING):
        return [*lines, "or start a new run: other parameters of the model have other shapes, too"]
    if not tables_in_host_memory(config):
        return [*lines, "or start a new run: tables on the device cannot start fresh in this one"]
    if config.checkpoint.unfit_tables == "fresh":
        return []
    typed = [text for line in lines if "=" in (text := line.partition(": ")[0])]
    command = " ".join(["mneme resume", str(run_dir), *typed, FRESH])
    return [*lines, f"or keep everything else and start the tables at zero:\n  {command}"]


def _show(value: object) -> str:
    text = json.dumps(value).replace(" ", "").strip('"')
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
