"""Schema of `data.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

PAIR_TOKENS = 4
"""Of a needle or a question in documents of `data.niah`: a line break, a mark, the key, the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One corpus: a folder with `train/` and `validation/` shards and their manifests."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: str
    """Folder or URL that `mneme data build` or `mneme data index` wrote."""
    weight: int = 1
    """Share of the draws; documents are drawn in the exact ratio of the weights. 0: none, until
    `weight_schedule` says otherwise."""
    epochs: int | None = None
    """How often each document may come at most; then the other sources share its draws, in each lane
    when its own share is used up. null: no end."""
    max_documents: int | None = None
    """Train on this many documents, the same ones for every seed, and more of them include fewer.
    They lie anywhere in the shards, so `block_documents` finds no neighbours. null: all."""
    held_out: float | None = None
    """Share of the documents kept for validation, the same ones for every seed, for sources that were
    built without splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightChange:
    """From this many tokens on, the sources have these weights."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tokens: int
    """Positions in sequences, over all ranks. Counts from the first sequence after so many."""
    weights: dict[str, int] = field(default_factory=dict)
    """Name of the source -> weight; 0 stops drawing from it. Sources not named keep theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultConfig:
    """What happens when bytes are not those that were written, or cannot be read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    damaged: Literal["raise", "skip"] = "raise"
    """A sample that is cut short, fails its checksum, cannot be decoded, or whose shard is gone."""
    max_skipped_fraction: float = 0.001
    """skip: the most that a lane may leave out of its draws, beyond one."""
    read_attempts: int = 5
    """How often a read is tried that fails for another reason (network, file system)."""
    retry_seconds: float = 0.5
    """Wait before the second attempt; doubles up to 60 s, with jitter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How many rows (tokens) an image or clip becomes; sizes in pixels follow from the model's patches."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    max_rows: int = 64
    """Of an image, or of one frame group of a clip. Larger images are made smaller, keeping aspect."""
    frames_per_second: float = 2.0
    """Frames taken from a clip."""
    max_frames: int = 16
    """Frames taken from a clip at most; then spread evenly over it."""


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
    """Batches prepared ahead by the loader thread, and by each worker process, which has one at least;
    0 without workers prepares in the training thread."""
    num_workers: int = 0
    """Processes that read and decode for each rank, at most one for each of its lanes; 0: the loader
    thread does. Needs no tuning for text. The batches do not depend on it."""
    packing: Literal["concat_split", "best_fit"] = "concat_split"
    """concat_split: documents one after another, cut at the sequence's end; no token is lost and, for
    text, none is padding. best_fit: of `lookahead` documents the largest that still fits; documents
    are cut only where they are longer than a sequence."""
    lookahead: int = 8
    """best_fit: documents that a lane has to choose from, 2 or more."""
    block_documents: int = 1
    """Neighbours in a shard that stay in one neighbourhood, for storage that is slow at random;
    1: documents are drawn from everywhere."""
    window_blocks: int = 64
    """Blocks that make a neighbourhood: among them documents are shuffled, and all lanes draw from
    about the same one."""
    weight_schedule: tuple[WeightChange, ...] = ()
    """Changes of the sources' weights, by tokens trained on. A run that goes on may have other changes
    from there on."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """Damaged samples and failing reads."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Sizes of images and clips."""
