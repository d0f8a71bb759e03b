"""Schema of `parallel.*` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

BackendName = Literal["auto", "cpu", "cuda", "ascend", "cambricon", "dry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work. World size = data x tensor x pipeline x context."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    data_parallel_size: int = 1
    """Ranks that see different sequences; parameters are fully sharded over them (and context)."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    """Ranks that hold different experts. Formed within data x context x tensor, adds no ranks."""
    reshard_after_forward: bool = True
    """True frees gathered parameters after the forward pass (ZeRO-3); False keeps them (ZeRO-2)."""
    backend: BackendName = "auto"
    """Device and collectives; the environment variable MNEME_BACKEND overrides."""
    timeout_seconds: float = 600.0
    """A collective that waits longer fails."""
