"""What decides which n-gram is which row of Engram's tables, as numbers: a part of their geometry."""

from collections.abc import Mapping
from typing import Any

from train.memory_plan import MemoryGeometry
from train.model.engram import Engram


def hash_of(engrams: Mapping[int, Engram]) -> dict[str, Any]:
    """By name, as plain values; nothing without memories.

    Args:
        engrams: by layer; their hashes know the tokenizer.
    """
    if not engrams:
        return {}
    found = MemoryGeometry.of(engrams)
    hashed: dict[str, Any] = {
        "compressed vocabulary of data.tokenizer, sha256": found.token_map_sha256,
        "token of images": found.dead_token_id,
    }
    for table in found.tables:
        hashed[f"primes of layer {table.layer}"] = list(table.moduli)
        hashed[f"multipliers of layer {table.layer}"] = list(table.multipliers)
    return hashed
