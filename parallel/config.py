"""Schema of `parallel.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

ContextSplit = Literal["zigzag", "contiguous"]
ExpertSharding = Literal["shard", "replicate"]
BackendName = Literal["auto", "cpu", "cuda", "ascend", "cambricon", "dry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """Which implementation of a kernel ranks use; auto: the fastest that is exact on the device."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    permute: Literal["auto", "reference", "megatron"] = "auto"
    """Sort of a rank's tokens by expert, and the weighted sum of their results: ours, or the
    device-neutral one of megatron-core, whose gradient is less exact in bf16."""
    grouped_linear: Literal["auto", "grouped_mm", "loop"] = "auto"
    """Products with the experts' weights: one grouped product of torch, or one for each expert."""
    cross_entropy: Literal["auto", "reference", "megatron", "megatron_fused"] = "auto"
    """Loss: ours, which keeps no fp32 logits, or megatron-core's in fp32, as its operations or compiled
    (`megatron_fused`: bf16 and tensor parallelism only)."""


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
    """True frees gathered parameters after the forward pass (ZeRO-3); False keeps them (ZeRO-2)."""
    backend: BackendName = "auto"
    """Device and collectives; the environment variable MNEME_BACKEND overrides."""
    timeout_seconds: float = 600.0
    """A collective that waits longer fails."""
