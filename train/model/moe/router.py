"""Which experts see a token, with what weight, and the balancing of their load; called by `layer`."""

from abc import abstractmethod
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.model.add_loss import add_loss, on_backward
from train.model.moe.config import MoeConfig, RouterKind
from train.model.moe.hash_table import token_expert_table
from train.model.tokens import Tokens


class Router(nn.Module):
    """Weights of the k experts that a subclass chooses: their scores, normalised and scaled.

    Scores are computed in fp32 or wider. In training, the backward pass counts the rank's tokens of
    each expert and, if `balance_scale` is not 0 and the choice is learnt, adds the sequence-wise
    balance loss to the gradient of the scores.

    Communication: for that loss, a sum of the counts over the ranks that share the sequences.
    """

    load_counts: Tensor
    balance_loss: Tensor
    learnt_choice: bool

    def __init__(self, config: MoeConfig, kind: RouterKind, hidden_size: int) -> None:
        super().__init__()
        self.kind, self.k = kind, config.num_experts_per_token
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.balance_scale = 0.0
        """Weight of the balance loss over the sequences of the global batch; set by the step."""
        counts = torch.empty(config.num_experts, dtype=torch.int64)
        self.register_buffer("load_counts", counts, persistent=False)
        loss = torch.empty((), dtype=torch.float32)
        self.register_buffer("balance_loss", loss, persistent=False)

    @abstractmethod
    def choose(
        self, scores: Float[Tensor, "batch seq experts"], input_ids: Int[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch seq k"]:
        """The experts of each token, all different, in any order."""

    def reset_buffers(self) -> None:
        """Nothing counted; needed again after a model moves from the meta device."""
        self.load_counts.zero_()
        self.balance_loss.zero_()

    def forward(
        self, x: Float[Tensor, "batch part hidden"], tokens: Tokens
    ) -> tuple[Int[Tensor, "batch part k"], Float[Tensor, "batch part k"]]:
        """Expert indices and their weights, the weights in fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = affinity(F.linear(x.to(wide), self.weight.to(wide)), self.kind)
        indices = self.choose(scores.detach(), tokens.part.take(tokens.input_ids))
        weights = scores.gather(-1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
        if self.training and weights.requires_grad:
            counts = count_tokens(indices, scores.shape[-1])
            loss = torch.zeros_like(self.balance_loss)
            if self.learnt_choice and self.balance_scale:
                all_counts = tokens.part.sum_over(counts)
                loss = sequence_balance_loss(scores, all_counts, self.k, tokens.part.length)
                loss = self.balance_scale * loss
                weights = add_loss(weights, loss)
            weights = on_backward(weights, partial(self._count, counts.sum(0), loss.detach()))
        return indices, weights

    def _count(self, counts: Tensor, loss: Tensor) -> None:
        self.load_counts += counts
        self.balance_loss += loss

    def update_bias(self, load_counts: Int[Tensor, "experts"]) -> None:
        """Balance the load after an optimizer step, where the choice can be moved."""


class TopKRouter(Router):
    """Top-k routing with auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2).

    A token goes to the k experts of the largest `score + expert_bias`. With groups it first picks
    the groups whose two best experts have the largest sum. Per optimizer step the bias of
    overloaded experts falls and that of others rises by gamma.
    """

    expert_bias: Tensor
    learnt_choice = True

    def __init__(self, config: MoeConfig, kind: RouterKind, hidden_size: int) -> None:
        super().__init__(config, kind, hidden_size)
        self.groups, self.groups_per_token = config.num_expert_groups, config.num_groups_per_token
        self.bias_update_speed = config.bias_update_speed
        self.register_buffer("expert_bias", torch.empty(config.num_experts, dtype=torch.float32))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """No bias, nothing counted."""
        super().reset_buffers()
        self.expert_bias.zero_()

    def choose(
        self, scores: Float[Tensor, "batch seq experts"], input_ids: Int[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch seq k"]:
        """The experts of the largest biased scores, in the best groups."""
        biased = scores + self.expert_bias
        if self.groups > 1:
            outside = outside_best_groups(biased, self.groups, self.groups_per_token)
            biased = biased.masked_fill(outside, float("-inf"))
        return biased.topk(self.k, dim=-1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load_counts: Int[Tensor, "experts"]) -> None:
        """`b_e += gamma * sign(mean load - load of e)` (arXiv 2408.15664, algorithm 1).

        Args:
            load_counts: tokens of each expert in the optimizer step, summed over all ranks.
        """
        load = load_counts.to(self.expert_bias.dtype)
        self.expert_bias += self.bias_update_speed * torch.sign(load.mean() - load)


class HashRouter(Router):
    """Experts by token id, from a fixed table; only their weights are learnt (V4, section 2.1).

    The table is part of a checkpoint: published models carry their own.

    Args:
        config: number of experts, k and seed.
        kind: scoring of the weights.
        hidden_size: width of the tokens.
        vocab_size: rows of the table.
        layer_index: makes the tables of the layers differ.
    """

    expert_table: Tensor
    learnt_choice = False

    def __init__(
        self,
        config: MoeConfig,
        kind: RouterKind,
        hidden_size: int,
        vocab_size: int,
        layer_index: int,
    ) -> None:
        super().__init__(config, kind, hidden_size)
        self.seed, self.layer_index = config.hash_seed, layer_index
        self.register_buffer("expert_table", torch.empty(vocab_size, self.k, dtype=torch.int64))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """The initial table, nothing counted."""
        super().reset_buffers()
        vocab_size, experts = len(self.expert_table), len(self.weight)
        table = token_expert_table(
            vocab_size, experts, self.k, seed=self.seed, layer_index=self.layer_index
        )
        self.expert_table.copy_(torch.from_numpy(table))

    def choose(
        self, scores: Float[Tensor, "batch seq experts"], input_ids: Int[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch seq k"]:
        """The table's rows."""
        chosen: Tensor = self.expert_table[input_ids]
        return chosen


def affinity(
    logits: Float[Tensor, "*batch experts"], kind: RouterKind
) -> Float[Tensor, "*batch experts"]:
    """Scores of all experts: softmax (V2), sigmoid (V3) or sqrt(softplus) (V4, also for hash)."""
    if kind == "softmax":
        return logits.softmax(-1)
    if kind == "sigmoid":
        return logits.sigmoid()
    return F.softplus(logits).sqrt()


def outside_best_groups(
    biased: Float[Tensor, "*batch experts"], groups: int, groups_per_token: int
) -> Bool[Tensor, "*batch experts"]:
    """True for experts that are not in one of a token's best groups of consecutive experts.

    A group's score is the sum of its two largest biased scores, as in DeepSeek-V3's code; the paper
    sums the largest k / groups_per_token of them, which is 2 in V3.
    """
    grouped = biased.view(*biased.shape[:-1], groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(groups_per_token, dim=-1).indices
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=biased.device)
    return outside.scatter(-1, best, False).repeat_interleave(grouped.shape[-1], dim=-1)


def count_tokens(
    indices: Int[Tensor, "batch seq k"], num_experts: int
) -> Int[Tensor, "batch experts"]:
    """Tokens of each sequence that go to each expert."""
    chosen = indices.flatten(1)
    counts = torch.zeros(len(chosen), num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))


def sequence_balance_loss(
    scores: Float[Tensor, "batch part experts"],
    counts: Int[Tensor, "batch experts"],
    k: int,
    length: int,
) -> Float[Tensor, ""]:
    """Sequence-wise balance loss without its weight, summed over sequences (V3, eq. 17-20).

    `sum_i f_i P_i` with f_i = experts / (k T) * tokens of expert i and P_i the mean over the T tokens
    of the sequence of the score of i, normalised over the experts. It is 1 when balanced. The parts
    of a sequence that several ranks compute add up.

    Args:
        scores: of the tokens of a part of each sequence.
        counts: tokens of the whole sequence that go to each expert.
        k: experts of a token.
        length: tokens T of the whole sequence.
    """
    fraction = counts * (scores.shape[-1] / (k * length))
    probability = (scores / scores.sum(-1, keepdim=True)).sum(1) / length
    return (fraction * probability).sum()
