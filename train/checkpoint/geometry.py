"""Which row of Engram's tables means what: kept with a checkpoint, compared before it is read.

A row is found by hashing tokens. With other primes, multipliers or token ids the same n-gram finds
another row, and nothing would look wrong: so what the hash depends on is written down, by every key
of the recipe, and as the numbers that follow from them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.memory_plan import MemoryGeometry
from train.memory_rules import tables_in_host_memory
from train.model.engram import Engram

Geometry = dict[str, dict[str, Any]]
"""`recipe`: key -> value; `hash`: what follows from these and the tokenizer, name -> value."""

RESHAPING = tuple(
    f"model.engram.{key}" for key in ("layers", "ngram_orders", "num_heads", "head_dim")
)
"""Keys that the shapes of the model's own parameters depend on, too."""
_FILE = "geometry.json"
_STORAGE = "parallel.engram.storage"
_PLACES = {"device": "device", "host": "memory, shared or mmap"}
"""Where rows are, and what to type for it."""
_SHOWN = 60


def geometry_of(config: RunConfig, engrams: Mapping[int, Engram]) -> Geometry:
    """What is known of the tables on a rank.

    Args:
        config: the recipe, which has Engram.
        engrams: those of the rank, by layer; their hashes know the tokenizer.
    """
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
    plain: Geometry = json.loads(json.dumps({"recipe": recipe, "hash": hash_of(engrams)}))
    return plain


def hash_of(engrams: Mapping[int, Engram]) -> dict[str, Any]:
    """All that decides which n-gram is which row, by name, as plain values."""
    hashed: dict[str, Any] = {}
    if engrams:
        found = MemoryGeometry.of(engrams)
        hashed["compressed vocabulary of data.tokenizer, sha256"] = found.token_map_sha256
        hashed["token of images"] = found.dead_token_id
        for table in found.tables:
            hashed[f"primes of layer {table.layer}"] = list(table.moduli)
            hashed[f"multipliers of layer {table.layer}"] = list(table.multipliers)
    return hashed


def merge(parts: Iterable[Geometry]) -> Geometry:
    """What all ranks know together."""
    whole: Geometry = {"recipe": {}, "hash": {}}
    for part in parts:
        for kind, values in part.items():
            whole[kind] |= values
    return whole


def write_geometry(folder: Path, geometry: Geometry) -> None:
    """Write it into the folder of the tables."""
    with (folder / _FILE).open("w", encoding="utf-8") as stream:
        json.dump(geometry, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())


def read_geometry(folder: Path) -> Geometry | None:
    """Read it; None where there is none, because the checkpoint knows nothing of tables.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        found: Geometry = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": dict(found["recipe"]), "hash": dict(found["hash"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def differences(saved: Geometry, config: RunConfig, now: Geometry) -> dict[str, str]:
    """By key of the recipe, or by name: why rows that were saved are not those of the recipe.

    What follows from keys that differ is left out.

    Args:
        saved: of the checkpoint.
        config: of today.
        now: its geometry.
    """
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
    """Of what `hash_of` knows, by name."""
    return {
        name: f"{name}: {_show(value)}, and {_show(saved['hash'].get(name))} in the checkpoint"
        for name, value in now.items()
        if saved["hash"].get(name) != value
    }


def _show(value: object) -> str:
    text = json.dumps(value).replace(" ", "").strip('"')
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
