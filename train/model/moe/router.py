"""Which experts see a token, with what weight, and the balancing of their load; called by `layer`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.add_loss import add_loss
from train.model.moe.config import MoeConfig, RouterKind


class Router(nn.Module):
    """Top-k routing with auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2).

    Scores are computed in fp32 or wider. A token goes to the k experts of the largest
    `score + expert_bias`; its weights are the scores alone, normalised over the k and scaled.
    Per optimizer step the bias of overloaded experts falls and that of others rises by gamma.

    In training with gradients it also counts the tokens of each expert and, if `balance_scale` is
    not 0, adds the sequence-wise balance loss to the gradient of the scores.
    """

    expert_bias: Tensor
    load_counts: Tensor

    def __init__(self, config: MoeConfig, kind: RouterKind, hidden_size: int) -> None:
        super().__init__()
        self.kind, self.k = kind, config.num_experts_per_token
        self.scaling, self.bias_update_speed = (
            config.routed_scaling_factor,
            config.bias_update_speed,
        )
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.balance_scale = 0.0
        """Weight of the balance loss over the sequences of the global batch; set by the step."""
        self.balance_loss: Float[Tensor, ""] | None = None
        """Scaled balance loss, summed since it was last taken."""
        self.register_buffer("expert_bias", torch.empty(config.num_experts, dtype=torch.float32))
        counts = torch.empty(config.num_experts, dtype=torch.int64)
        self.register_buffer("load_counts", counts, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """No bias, nothing counted; needed again after a model moves from the meta device."""
        self.expert_bias.zero_()
        self.load_counts.zero_()

    def forward(
        self, x: Float[Tensor, "batch seq hidden"]
    ) -> tuple[Int[Tensor, "batch seq k"], Float[Tensor, "batch seq k"]]:
        """Expert indices and their weights, the weights in fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = affinity(F.linear(x.to(wide), self.weight.to(wide)), self.kind)
        biased = scores.detach() + self.expert_bias
        indices = biased.topk(self.k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
        if self.training and torch.is_grad_enabled():
            counts = count_tokens(indices, scores.shape[-1])
            self.load_counts += counts.sum(0)
            if self.balance_scale:
                loss = self.balance_scale * sequence_balance_loss(scores, counts, self.k)
                kept = loss.detach()
                self.balance_loss = kept if self.balance_loss is None else self.balance_loss + kept
                weights = add_loss(weights, loss)
        return indices, weights

    @torch.no_grad()
    def update_bias(self, load_counts: Int[Tensor, "experts"]) -> None:
        """`b_e += gamma * sign(mean load - load of e)` (arXiv 2408.15664, algorithm 1).

        Args:
            load_counts: tokens of each expert in the optimizer step, summed over all ranks.
        """
        load = load_counts.to(self.expert_bias.dtype)
        self.expert_bias += self.bias_update_speed * torch.sign(load.mean() - load)


def affinity(
    logits: Float[Tensor, "*batch experts"], kind: RouterKind
) -> Float[Tensor, "*batch experts"]:
    """Scores of all experts: softmax (V2), sigmoid (V3) or sqrt(softplus) (V4)."""
    if kind == "softmax":
        return logits.softmax(-1)
    if kind == "sigmoid":
        return logits.sigmoid()
    return F.softplus(logits).sqrt()


def count_tokens(
    indices: Int[Tensor, "batch seq k"], num_experts: int
) -> Int[Tensor, "batch experts"]:
    """Tokens of each sequence that go to each expert."""
    chosen = indices.flatten(1)
    counts = torch.zeros(len(chosen), num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))


def sequence_balance_loss(
    scores: Float[Tensor, "batch seq experts"], counts: Int[Tensor, "batch experts"], k: int
) -> Float[Tensor, ""]:
    """Sequence-wise balance loss without its weight, summed over sequences (V3, eq. 17-20).

    `sum_i f_i P_i` with f_i = experts / (k T) * tokens of expert i and P_i the mean over the T tokens
    of the sequence of the score of i, normalised over the experts. It is 1 when balanced.
    """
    seq, num_experts = scores.shape[1:]
    fraction = counts * (num_experts / (k * seq))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (fraction * probability).sum()
