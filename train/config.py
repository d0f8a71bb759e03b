"""Schema of a whole recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from data.config import DataConfig
from parallel.config import ParallelConfig
from train.model.config import ModelConfig

TableKind = Literal["engram", "embedding", "head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, gradient clipping and learning-rate schedule."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the weight matrices. Vectors are always on AdamW; muon: as in DeepSeek-V4."""
    table_optimizer: Literal["adamw", "sinkhorn"] = "adamw"
    """Of the tables in `tables`; sinkhorn: the Sinkhorn-balanced momentum of DeepSeek-V4.1."""
    tables: tuple[TableKind, ...] = ("engram", "embedding", "head")
    """What `table_optimizer` updates; the other tables are on AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.95
    """Nesterov momentum of muon and sinkhorn."""
    update_rms: float = 0.18
    """Root mean square of an update of muon and sinkhorn over the learning rate (gamma)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of weight matrices; norms, biases, gates and Engram tables have none."""
    engram_learning_rate_multiplier: float = 5.0
    """Learning rate of Engram tables over that of the backbone (Engram, appendix A)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    schedule: Literal["constant", "cosine", "step", "wsd"] = "cosine"
    """After the warm-up: constant; cosine to the end; step: x0.316 at 80 % and x0.1 at 90 % of the
    steps (mHC, table 5); wsd: constant, then linear over the last `decay_fraction`."""
    warmup_steps: int = 20
    """Linear from 0."""
    final_fraction: float = 0.1
    """Learning rate at the end over the peak, for cosine and wsd."""
    decay_fraction: float = 0.2
    """Share of the steps that decays, for wsd."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: int = 100
    """Optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    global_batch_size: int = 16
    """Sequences in an optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences that one rank computes at a time."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; master weights and optimizer states stay fp32 (fp64 for fp64)."""
    deterministic: bool = True
    """Refuse operations whose result depends on timing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    every_steps: int = 50
    """Steps between saves; the last step is always saved."""
    keep_last: int = 2
    """Complete checkpoints that stay on disk; older ones are removed after a newer one is whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Loss on held-out shards."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    every_steps: int = 50
    """Steps between evaluations, 0: never; the last step is evaluated too."""
    num_sequences: int = 32
    """Sequences of the held-out split, the same ones each time; a multiple of the data ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """Where the numbers go besides metrics.jsonl."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tensorboard: bool = True
    wandb: bool = True
    """Offline unless WANDB_API_KEY is set."""
    wandb_project: str = "mneme"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How ranks are started and stopped on this node."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    threads_per_rank: int | None = None
    """OMP_NUM_THREADS of a rank; null: cores of the node / ranks on it, at least 1."""
    stop_deadline_seconds: float = 120.0
    """After a stop request, ranks that have not saved and left by then are killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A resolved recipe: what `recipe.yaml` of a run holds and what every rank reads."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Name of the recipe."""
    description: str = ""
    """One line for `mneme list`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
