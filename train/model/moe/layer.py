"""The mixture-of-experts layer: router, dispatch, experts, shared expert; called by `block`."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.expert import Dispatcher, LocalDispatcher
from train.model.config import ModelConfig
from train.model.ffn import FeedForward
from train.model.moe.experts import Experts
from train.model.moe.router import HashRouter, Router, TopKRouter
from train.model.tokens import Tokens


class MoeLayer(nn.Module):
    """DeepSeekMoE: `sum_k w_k expert_k(x) + shared(x)` (arXiv 2412.19437, eq. 12).

    `dispatch` may be replaced by one that exchanges tokens with other ranks: the shared expert is
    computed while they travel, and its gradient while theirs do.

    Args:
        config: the model.
        layer_index: place in the network from 0; MTP blocks follow the layers.
    """

    router: Router

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.num_experts = moe.num_experts
        self.place = layer_index - config.num_dense_layers
        """Among the mixture-of-experts layers of the whole model, from 0."""
        if config.router == "hash" or self.place < moe.num_hash_layers:
            self.router = HashRouter(moe, config.router, hidden, config.vocab_size, layer_index)
        else:
            self.router = TopKRouter(moe, config.router, hidden)
        self.experts = Experts(moe, hidden, config.swiglu_limit)
        self.shared: FeedForward | None = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.expert_intermediate_size
            # V4's published code clamps the routed experts only; the paper is silent.
            self.shared = FeedForward(hidden, width, limit=None)
        self.dispatch: Dispatcher = LocalDispatcher(moe.num_experts)

    def forward(
        self, x: Float[Tensor, "batch part hidden"], tokens: Tokens
    ) -> Float[Tensor, "batch part hidden"]:
        """Route, apply the experts and add the shared expert."""
        indices, weights = self.router(x, tokens)
        rows = x.flatten(0, 1)
        collect = self.dispatch(rows, indices.flatten(0, 1), weights.flatten(0, 1), self.experts)
        shared = None if self.shared is None else self.shared(x)
        routed = collect().view(x.shape)
        return routed if shared is None else routed + shared

    @property
    def expert_bias(self) -> Float[Tensor, "experts"] | None:
        """The load-balancing bias of the router; None with hash routing."""
        return self.router.expert_bias if isinstance(self.router, TopKRouter) else None

    @property
    def balance_scale(self) -> float:
        """Weight of the balance loss over the sequences of the global batch; 0 switches it off."""
        return self.router.balance_scale

    @balance_scale.setter
    def balance_scale(self, scale: float) -> None:
        self.router.balance_scale = scale

    def take_load_counts(self) -> Int[Tensor, "experts"]:
        """Tokens of each expert in the backward passes since the last call; starts over."""
        counts = self.router.load_counts.clone()
        self.router.load_counts.zero_()
        return counts

    def take_balance_loss(self) -> Float[Tensor, ""]:
        """Scaled balance loss of the backward passes since the last call; starts over."""
        loss = self.router.balance_loss.clone()
        self.router.balance_loss.zero_()
        return loss
