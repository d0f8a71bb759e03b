"""Schema of a whole recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from pydantic import ConfigDict

from data.config import DataConfig
from parallel.config import ParallelConfig
from train.model.attention.config import IndexerStage
from train.model.config import ModelConfig, Recompute

TableKind = Literal["engram", "embedding", "head"]
EngramOptimizer = Literal["adam", "adagrad", "sinkhorn"]
UnfitTables = Literal["refuse", "fresh"]


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
    engram_optimizer: EngramOptimizer = "adam"
    """Of Engram tables in host memory (`parallel.engram.storage`), which changes the rows that a step
    reads and no others. adam: AdamW's, with a count of steps for each row; adagrad: one number a row;
    sinkhorn: the balanced momentum of `table_optimizer`. On the device the keys above decide."""
    engram_learning_rate_multiplier: float = 5.0
    """Learning rate of Engram tables over that of the backbone (Engram, appendix A)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    schedule: Literal["constant", "cosine", "step", "wsd"] = "cosine"
    """After the warm-up: constant; cosine and wsd: constant, then down along a cosine or a line;
    step: x0.316 at 80 % and x0.1 at 90 % of the steps (mHC, table 5)."""
    warmup_steps: int = 20
    """Linear from 0."""
    final_fraction: float = 0.1
    """Learning rate after the decay over the peak, for cosine and wsd."""
    decay_fraction: float | None = None
    """Share of the steps that decays, for cosine and wsd; null: cosine all after the warm-up, wsd
    0.2."""
    decay_end: float = 1.0
    """Share of the steps at which the decay of cosine and wsd has ended; constant from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizeRampConfig:
    """From a small global batch to the full one, as megatron-core's `rampup-batch-size`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start: int
    """Sequences in the first optimizer steps."""
    increment: int
    """Sequences that are added at a time, in equal intervals of `samples`."""
    samples: int
    """Sequences of the run before the batch is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A part of the run with its own batches. A key that is null is that of the run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: int | None = None
    """Optimizer steps; null, in the last stage only: what is left of `train.steps`."""
    sequence_length: int | None = None
    """Tokens in a packed sequence; null: `data.sequence_length`."""
    global_batch_size: int | None = None
    """Sequences in an optimizer step; null: `train.global_batch_size`."""
    micro_batch_size: int | None = None
    """Sequences that one rank computes at a time; null: `train.micro_batch_size`."""
    learning_rate: float | None = None
    """Constant in the stage, in place of `optim.schedule`."""
    indexer_stage: IndexerStage | None = None
    """Training stage of sparse attention; null: `model.indexer.stage`."""


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
    batch_size_ramp: BatchSizeRampConfig | None = None
    """Grow the batch at the start of the run to `global_batch_size`; null: full from the start."""
    stages: tuple[StageConfig, ...] = ()
    """Parts of the run one after the other, such as 4K, 16K, 64K and 1M tokens a sequence; empty:
    one. Evaluation keeps `data.sequence_length` and `micro_batch_size`."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; master weights and optimizer states stay fp32 (fp64 for fp64)."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: nothing; the residual streams of
    mHC, from every few blocks' first and the sub-layers' outputs; or every block, in full."""
    answers_only: bool = False
    """Learn nothing but the answers to `evaluate.num_questions` questions, of documents of `mneme data
    build niah`: the text around them is read and not predicted."""
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
    keep_every_steps: int = 0
    """Checkpoints of multiples of this step stay for good, too; 0: none. A multiple of `every_steps`."""
    asynchronous: bool = True
    """Write behind the next steps, from a copy of the state: a save holds training up while that is
    made, and needs as much host memory as the rank's share of the state. It is on disk some steps later;
    the next save, and a run that ends or is asked to stop, wait for it. false: the step waits. With
    `parallel.data_engine=deepspeed` training also waits until the shards were gathered."""
    unfit_tables: UnfitTables = "refuse"
    """What to do where a run resumes and the checkpoint's Engram tables are not those of the recipe:
    refuse, or keep everything else and start fresh tables in host memory, at zero. Tables that fit are
    read in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Loss on held-out shards."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    every_steps: int = 50
    """Steps between evaluations, 0: never; the last step is evaluated too."""
    num_sequences: int = 32
    """Sequences of the held-out split, the same ones each time; a multiple of the data ranks."""
    num_questions: int = 0
    """Questions at the end of each held-out document whose answers are scored (niah/accuracy), for
    documents of `mneme data build niah`; 0: none."""


AlarmAction: TypeAlias = Literal["log", "save", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmConfig:
    """A bound on a metric; what happens goes to events.jsonl."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    metric: str
    """A name in metrics.jsonl."""
    above: float | None = None
    """Raised above this; null: no such bound."""
    below: float | None = None
    """Raised below this; null: no such bound."""
    records: int = 1
    """Records of the metric, one after the other, that must break the bound."""
    action: AlarmAction = "log"
    """log: only that; save: a checkpoint after the step; stop: that, and end with exit code 86."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """What is watched, and where the numbers go besides metrics.jsonl."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tensorboard: bool = True
    wandb: bool = True
    """Offline unless WANDB_API_KEY is set."""
    wandb_project: str = "mneme"
    residual_every_steps: int = 10
    """Steps between two looks at the gains of hyper-connections; 0: never."""
    expert_load_every_steps: int = 20
    """Steps between two rows of `expert_load.jsonl`, the load of every expert; 0: never. A row takes
    about 1.4 bytes an expert and layer: 32 KB for 61 layers of 384."""
    peak_flops_per_device: float | None = None
    """Floating-point operations a second that `model_flops_utilization` is a share of; null: the
    vendor's figure for the device and `train.dtype`, or a measurement where none is known."""
    alarms: dict[str, AlarmConfig] = field(default_factory=dict)
    """Name -> rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How ranks are started, stopped, and started again."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    nodes: int = 1
    """Nodes that the ranks are on, the same number on each."""
    threads_per_rank: int | None = None
    """OMP_NUM_THREADS of a rank; null: cores of the node / ranks on it, at least 1."""
    stop_deadline_seconds: float = 120.0
    """After a stop request, ranks that have not saved and left by then are killed."""
    max_restarts_without_progress: int = 3
    """After a crash all ranks are started again from the newest checkpoint, at most so often in a row
    without a newer checkpoint; 0: never."""
    join_deadline_seconds: float = 600.0
    """How long node 0 waits for the other nodes at the start, and for one that was lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What `mneme launch` asks a cluster for."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    accelerators_per_node: int = 8
    """Devices that a node has, at least `ranks / launch.nodes`; a job asks for those that it uses."""
    cpus_per_node: int | None = None
    """Processor cores to ask for, which Slurm has to be told; null: what the cluster gives."""
    memory_gib_per_node: int | None = None
    """Host memory to ask for; null: what the cluster gives."""
    queue: str | None = None
    """Partition of Slurm, queue of Volcano; null: the cluster's default."""
    account: str | None = None
    """Slurm's account."""
    time_limit_minutes: int = 1440
    """Slurm ends a job after this; it saves before, and goes on in the next job."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start on Slurm, such as `module load cuda`."""
    image: str | None = None
    """Container image for Kubernetes, Kubeflow and Volcano."""
    namespace: str = "default"
    """Kubernetes namespace."""
    volume_claim: str | None = None
    """PersistentVolumeClaim that all pods mount: corpora and runs. Has to be ReadWriteMany."""
    volume_path: str = "/data"
    """Where pods mount it. Relative paths of the recipe are below it."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of all ranks."""


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
