"""Schema of `data.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One corpus: a folder with `train/` and `validation/` shards and their manifests."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: str
    """Folder that `mneme data build` wrote."""
    weight: int = 1
    """Share of the draws; documents are drawn in the exact ratio of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is trained on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> corpus."""
    tokenizer: str = "corpus/tokenizer.json"
    """A `tokenizers` JSON file."""
    sequence_length: int = 256
    """Tokens in a packed sequence."""
    num_lanes: int | None = None
    """Virtual lanes V, fixed for the life of a run: the order depends on V, never on the number of
    ranks or workers. Must divide the global batch; null: the global batch size."""
    prefetch_batches: int = 2
    """Batches prepared ahead by the loader thread; 0 prepares in the training thread."""
