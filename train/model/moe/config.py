"""Schema of `model.moe` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

RouterKind = Literal["softmax", "sigmoid", "sqrtsoftplus", "hash"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """Mixture of experts with auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_experts: int = 8
    """Routed experts in a layer."""
    num_experts_per_token: int = 2
    """Routed experts that see a token (top-k)."""
    num_shared_experts: int = 1
    """Experts that see every token; computed as one of `num_shared_experts` times the width."""
    expert_intermediate_size: int = 64
    """Width of one expert."""
    routed_scaling_factor: float = 1.0
    """Factor on the normalised routing weights."""
    bias_update_speed: float = 1e-3
    """gamma of the load-balancing bias: added or subtracted once per optimizer step."""
    balance_loss_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (eq. 17-20); 0 switches it off."""
