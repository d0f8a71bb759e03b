"""The mixture-of-experts layer: router, dispatch, experts, shared expert; called by `block`."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.ffn import FeedForward
from train.model.moe.experts import Experts, LocalDispatcher
from train.model.moe.router import Router

Dispatch = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]
"""(tokens [tokens hidden], indices [tokens k], weights [tokens k], experts) -> [tokens hidden]."""


class MoeLayer(nn.Module):
    """DeepSeekMoE: `sum_k w_k expert_k(x) + shared(x)` (arXiv 2412.19437, eq. 12).

    `dispatch` may be replaced by one that exchanges tokens with other ranks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, limit = config.moe, config.swiglu_limit
        self.num_experts = moe.num_experts
        self.router = Router(moe, config.router, config.hidden_size)
        self.experts = Experts(moe, config.hidden_size, limit)
        self.shared: FeedForward | None = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.expert_intermediate_size
            self.shared = FeedForward(config.hidden_size, width, limit)
        self.dispatch: Dispatch = LocalDispatcher(moe.num_experts)

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """Route, apply the experts and add the shared expert."""
        indices, weights = self.router(x)
        tokens = x.flatten(0, 1)
        routed = self.dispatch(tokens, indices.flatten(0, 1), weights.flatten(0, 1), self.experts)
        out = routed.view(x.shape)
        return out if self.shared is None else out + self.shared(x)

    @property
    def expert_bias(self) -> Float[Tensor, "experts"]:
        """The load-balancing bias of the router."""
        return self.router.expert_bias

    @property
    def balance_scale(self) -> float:
        """Weight of the balance loss over the sequences of the global batch; 0 switches it off."""
        return self.router.balance_scale

    @balance_scale.setter
    def balance_scale(self, scale: float) -> None:
        self.router.balance_scale = scale

    def take_load_counts(self) -> Int[Tensor, "experts"]:
        """Tokens of each expert on this rank since the last call; starts over."""
        counts = self.router.load_counts.clone()
        self.router.load_counts.zero_()
        return counts

    def take_balance_loss(self) -> Float[Tensor, ""]:
        """Scaled balance loss of this rank since the last call; starts over."""
        taken, self.router.balance_loss = self.router.balance_loss, None
        return torch.zeros(()) if taken is None else taken

    def update_bias(self, load_counts: Int[Tensor, "experts"]) -> None:
        """See `Router.update_bias`."""
        self.router.update_bias(load_counts)
