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
    num_expert_groups: int = 1
    """Equal groups of consecutive experts (V3, section 2.1.2: the experts of a node); 1 for none."""
    num_groups_per_token: int = 1
    """Groups that a token's experts may come from."""
    num_hash_layers: int = 0
    """Leading MoE layers that choose experts by token id (V4); all of them with `router: hash`."""
    hash_seed: int = 0
    """Seed of the tables of those layers."""
    routed_scaling_factor: float = 1.0
    """Factor on the normalised routing weights."""
    bias_update_speed: float = 1e-3
    """gamma of the load-balancing bias: added or subtracted once per optimizer step."""
    balance_loss_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (eq. 17-20); 0 switches it off."""
