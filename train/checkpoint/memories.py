"""Memories of a model that read a checkpoint's tables where they are: evaluation without a training run.

The model's parameters come from the same checkpoint, by other means.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from parallel.engram_reader import TableReader, open_tables
from train.checkpoint.geometry import hash_differences, read_geometry
from train.checkpoint.hashes import hash_of
from train.model.engram import Engram, Lookup, memory_rows
from train.model.tokens import Tokens


def read_memories(checkpoint: Path, engrams: Mapping[int, Engram]) -> None:
    """Let memories look their rows up in the files of a checkpoint, and never change them.

    Args:
        checkpoint: a committed one with tables in host memory, of any layout.
        engrams: by layer; their hashes know the tokenizer. Tables of their own are not used.

    Raises:
        ValueError: the checkpoint has no such tables, they are of another geometry, or a file is
            missing or damaged.
    """
    saved = read_geometry(checkpoint)
    if saved is None:
        raise ValueError(f"{checkpoint}: holds no Engram tables")
    if found := hash_differences(saved, hash_of(engrams)):
        raise ValueError("\n".join(found.values()))
    reader = open_tables(checkpoint)
    for layer, engram in engrams.items():
        engram.lookup = _lookup(reader, layer, engram)


def _lookup(reader: TableReader, layer: int, engram: Engram) -> Lookup:
    def lookup(tokens: Tokens) -> Float[Tensor, "batch part columns head_dim"]:
        ids = memory_rows(engram.hash, tokens)
        return torch.from_numpy(reader.rows(layer, ids.cpu().numpy())).to(ids.device)

    return lookup
