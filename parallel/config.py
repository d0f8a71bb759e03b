"""Schema of `parallel.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

ContextSplit = Literal["zigzag", "contiguous"]
ExpertSharding = Literal["shard", "replicate"]
PipelineSchedule = Literal[
    "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]
BackendName = Literal["auto", "cpu", "cuda", "ascend", "cambricon", "simulated", "dry"]
BACKENDS_WITHOUT_FP64: frozenset[BackendName] = frozenset({"ascend", "cambricon", "simulated"})
"""As their `Capabilities` say, which need torch."""
FLASH_MAX_HEAD_DIM = 256
"""Channels of a head that FlashAttention takes."""
Offload = Literal["none", "cpu", "nvme"]
EngramStorage = Literal["device", "memory", "shared", "mmap"]
EngramRowDtype = Literal["fp32", "bf16", "fp8"]
EngramPrefetch = Literal["exact", "off", "stale"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """What DeepSpeed's ZeRO shards over the ranks, and where it keeps that."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stage: Literal[1, 2, 3] = 3
    """Shards the optimizer's states and master weights (1), gradients too (2), parameters too (3)."""
    offload_optimizer: Offload = "none"
    """Where states and master weights are kept and updated: on the device, in host memory, or on
    NVMe (stage 3)."""
    offload_parameters: Offload = "none"
    """Where the sharded parameters are kept; stage 3."""
    nvme_path: str | None = None
    """Directory on a local NVMe drive for what is kept there; scratch, not a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """Which implementation of a kernel ranks use; auto: the fastest that is exact on the device."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    permute: Literal["auto", "reference", "megatron"] = "auto"
    """Sort of a rank's tokens by expert, and the weighted sum of their results: ours, or the
    device-neutral one of megatron-core, whose gradient is less exact in bf16."""
    grouped_linear: Literal["auto", "grouped_mm", "loop"] = "auto"
    """Products with the experts' weights: one grouped product of torch, or one for each expert."""
    attention: Literal["auto", "flash", "reference"] = "auto"
    """Dense latent attention in bf16 on ranks that see whole sequences: FlashAttention of torch, or
    ours, which is taken for everything else, too."""
    cross_entropy: Literal["auto", "reference", "megatron", "megatron_fused"] = "auto"
    """Loss: ours, which keeps no fp32 logits, or megatron-core's in fp32, as its operations or compiled
    (`megatron_fused`: bf16 and tensor parallelism only)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramTableConfig:
    """Where the rows of Engram's memory lie and how they travel."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    storage: EngramStorage = "device"
    """device: parameters like all others, sharded and gathered with their block; else rows spread
    over the ranks' host memory and trained there: private memory, memory shared by the ranks of a
    node, or files mapped into memory."""
    dtype: EngramRowDtype = "fp32"
    """Of the rows in host memory: fp32 (fp64 in fp64 runs), bf16 with stochastic rounding, or fp8
    (e4m3) with stochastic rounding and a scale for each row."""
    prefetch: EngramPrefetch = "exact"
    """Rows of the next step travel while this one runs. exact: those that this step changes follow
    after its update, so nothing is ever out of date; off: all travel when they are needed; stale:
    all travel early, and miss the last update."""
    huge_pages: bool = True
    """Ask for 2 MB pages for private memory: faster, but memory is taken in such pieces."""
    path: str | None = None
    """Directory of the files of `mmap`, on a local drive; scratch, not a checkpoint."""
    timeout_seconds: float = 300.0
    """An exchange of rows that waits longer fails; longer than one rank may lag behind another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work. World size = data_replicate x data x tensor x pipeline x context."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    data_parallel_size: int = 1
    """Ranks that see different sequences; parameters are fully sharded over them (and context)."""
    data_replicate_parallel_size: int = 1
    """Copies of the sharded parameters (HSDP): gradients are summed between the copies, and the
    gathering of parameters stays within one. Their ranks see different sequences, too."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    """Ranks that hold different layers. The other pipeline keys say how; unused with 1."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """Order of the microbatches' forward and backward passes. 1f1b: one of each in turn;
    interleaved_1f1b and looped_bfs: with several stages on a rank, by microbatch or by stage;
    interleaved_zero_bubble, zbv and dualpipev: gradients of weights are computed later than those
    of inputs, in what would be waiting time. zbv and dualpipev place two stages on a rank, in a V:
    the first rank has the first stage and the last."""
    pipeline_stages_per_rank: int = 1
    """Stages on a rank: 1 with 1f1b, 2 with zbv and dualpipev."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each stage, in order; null: even, with one more in the first stages. The first stage
    also has the embedding and the vision tower, the last one the head and MTP."""
    context_parallel_size: int = 1
    context_split: ContextSplit = "zigzag"
    """Which tokens of a sequence a context-parallel rank computes: the i-th of as many pieces as
    there are ranks (contiguous), or the i-th and the i-th last of twice as many (zigzag), which
    gives all ranks the same number of query-key pairs."""
    expert_parallel_size: int = 1
    """Ranks that hold different experts. Formed within data_replicate x data x context x tensor, adds
    no ranks."""
    expert_sharding: ExpertSharding = "shard"
    """What ranks that hold the same experts do with them: shard their parameters as all others are,
    or keep them whole (replicate), so that nothing is gathered and only gradients are summed."""
    expert_dispatcher: Literal["all_to_all", "deepep"] = "all_to_all"
    """How tokens reach their experts: torch's collectives, or DeepEP (CUDA and bf16 only)."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    reshard_after_forward: bool = True
    """True frees gathered parameters after the forward pass (ZeRO-3); False keeps them (ZeRO-2).
    Must be false with interleaved_zero_bubble, zbv and dualpipev."""
    data_engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """Who shards over the data ranks: FSDP2, or DeepSpeed for one node with little device memory."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Of `data_engine: deepspeed`."""
    engram: EngramTableConfig = field(default_factory=EngramTableConfig)
    """Of models with Engram."""
    backend: BackendName = "auto"
    """Device and collectives; the environment variable MNEME_BACKEND overrides. simulated: the host,
    where what HCCL lacks is refused; dry: for planning only."""
    timeout_seconds: float = 600.0
    """A collective that waits longer fails."""
