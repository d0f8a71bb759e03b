"""What Engram's memory is and what a batch reads of it: no model, no device, no other rank.

`train.memory` plans every step with it ahead of time, in the thread that prepares batches.
"""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Batch
from parallel.engram_plan import StepPlan, plan_step, subtree_limits, token_places
from parallel.sequence import SequenceSplit
from train.model.engram import Engram, memory_rows
from train.model.engram_hash import NgramHash
from train.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """The table of one layer: whatever of its hash decides which n-gram is which row."""

    layer: int
    first_row: int
    """Its place in the flat table, which has the layers of a rank's stages one behind the other."""
    num_rows: int
    moduli: tuple[int, ...]
    """Rows of each head, by order, then head."""
    offsets: tuple[int, ...]
    """First row of each head in the layer's table."""
    multipliers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryGeometry:
    """Which row of the flat table means what: rows of another geometry are noise here."""

    tables: tuple[LayerTable, ...]
    orders: tuple[int, ...]
    num_heads: int
    head_dim: int
    seed: int
    pad_token_id: int
    dead_token_id: int | None
    token_map_sha256: str
    """Of the compressed id of every token, as little-endian int64."""

    @classmethod
    def of(cls, engrams: Mapping[int, Engram]) -> "MemoryGeometry":
        """Of memories whose hashes know the tokenizer.

        Args:
            engrams: by layer, at least one.
        """
        tables, first_row = [], 0
        for layer, engram in engrams.items():
            geometry = engram.hash.geometry
            tables.append(
                LayerTable(
                    layer=layer,
                    first_row=first_row,
                    num_rows=geometry.num_rows,
                    moduli=tuple(modulus for heads in geometry.moduli for modulus in heads),
                    offsets=tuple(geometry.offsets),
                    multipliers=tuple(engram.hash.multipliers.tolist()),
                )
            )
            first_row += geometry.num_rows
        one = next(iter(engrams.values())).hash
        return cls(
            tables=tuple(tables),
            orders=one.orders,
            num_heads=one.num_heads,
            head_dim=one.config.head_dim,
            seed=one.config.seed,
            pad_token_id=one.pad_token_id,
            dead_token_id=one.dead_token_id,
            token_map_sha256=hashlib.sha256(
                one.token_map.cpu().numpy().astype("<i8").tobytes()
            ).hexdigest(),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the flat table."""
        return sum(table.num_rows for table in self.tables)

    @property
    def columns_per_layer(self) -> int:
        """Rows that a token reads in a layer."""
        return len(self.orders) * self.num_heads

    def columns(self, layer: int) -> slice:
        """Which of the rows that a token reads belong to a layer."""
        index = [table.layer for table in self.tables].index(layer)
        return slice(index * self.columns_per_layer, (index + 1) * self.columns_per_layer)


class MemoryPlanner:
    """Plans what this rank's tokens read. Knows token ids only, so it may run anywhere, anytime.

    Args:
        engrams: those of this rank's stages, by layer.
        geometry: of them.
        split: which tokens of a sequence are this rank's.
        data: this rank's place among those that see different sequences, and their number.
        ranks: that share the tables.
    """

    def __init__(
        self,
        engrams: Mapping[int, Engram],
        geometry: MemoryGeometry,
        split: SequenceSplit,
        *,
        data: tuple[int, int],
        ranks: int,
    ) -> None:
        self._hashes: list[NgramHash] = [deepcopy(e.hash).cpu() for e in engrams.values()]
        self._geometry, self._split, self._data, self._ranks = geometry, split, data, ranks
        self._places = lru_cache(maxsize=4)(self._places_of)

    def plan(self, batch: Batch) -> StepPlan:
        """Rows of this rank's tokens of a step, sequence after sequence, and who owns them.

        Args:
            batch: this rank's sequences; every data rank has as many.

        Raises:
            IndexError: a row is outside the tables.
        """
        part = self._split.of(batch.input_ids.shape[1])
        tokens = Tokens(batch.input_ids, batch.position_ids, batch.document_ids, part)
        hashed: list[Tensor] = [
            memory_rows(hashing, tokens) + table.first_row
            for hashing, table in zip(self._hashes, self._geometry.tables, strict=True)
        ]
        places, limits = self._places(*batch.input_ids.shape)
        return plan_step(
            torch.cat(hashed, dim=-1).flatten(0, 1).numpy(),
            places,
            limits,
            num_rows=self._geometry.num_rows,
            ranks=self._ranks,
        )

    def _places_of(self, sequences: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Places of this rank's tokens in the global batch, the same in every step of a shape."""
        rank, size = self._data
        first = np.arange(rank * sequences, (rank + 1) * sequences)
        runs = self._split.of(length).runs
        positions = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        places = token_places(
            np.repeat(first, len(positions)), np.tile(positions, sequences), length
        )
        limits = subtree_limits(places, num_sequences=size * sequences, sequence_length=length)
        return places, limits
