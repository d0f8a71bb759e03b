"""Schema of `parallel.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

ContextSplit = Literal["zigzag", "contiguous"]
BackendName = Literal["auto", "cpu", "cuda", "ascend", "cambricon", "dry"]


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
    """Ranks that hold different experts. Formed within data x context x tensor, adds no ranks."""
    reshard_after_forward: bool = True
    """True frees gathered parameters after the forward pass (ZeRO-3); False keeps them (ZeRO-2)."""
    backend: BackendName = "auto"
    """Device and collectives; the environment variable MNEME_BACKEND overrides."""
    timeout_seconds: float = 600.0
    """A collective that waits longer fails."""
