"""The routed experts of one layer and the dispatch of tokens to them on one rank.

`layer` holds both. Expert parallelism replaces the dispatch (`MoeLayer.dispatch`) and cuts the
experts along dim 0; neither file knows about ranks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.ffn import swiglu
from train.model.moe.config import MoeConfig


class Experts(nn.Module):
    """SwiGLU experts stacked on dim 0; the gate rows of `gate_up` come before the up rows."""

    def __init__(self, config: MoeConfig, hidden_size: int, limit: float | None) -> None:
        super().__init__()
        experts, width = config.num_experts, config.expert_intermediate_size
        self.limit = limit
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(
        self, rows: Float[Tensor, "rows hidden"], counts: Int[Tensor, "local_experts"]
    ) -> Float[Tensor, "rows hidden"]:
        """Apply each expert to its rows.

        Every expert is computed, also on no rows: with expert parallelism the graph must reach
        the exchange on every rank, or the others wait for it in backward.

        Args:
            rows: sorted by expert.
            counts: rows of each expert.
        """
        # unbind, not indexing: its backward stacks the gradients instead of padding each to full size.
        experts = zip(
            torch.split(rows, counts.tolist()),
            self.gate_up.unbind(),
            self.down.unbind(),
            strict=True,
        )
        outputs = []
        for part, gate_up, down in experts:
            gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(swiglu(gate, up, self.limit), down))
        return torch.cat(outputs)


class LocalDispatcher:
    """Bring tokens to experts that are all on this rank, and the results back.

    Args:
        num_experts: experts of the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        tokens: Float[Tensor, "tokens hidden"],
        expert_indices: Int[Tensor, "tokens k"],
        expert_weights: Float[Tensor, "tokens k"],
        experts: nn.Module,
    ) -> Float[Tensor, "tokens hidden"]:
        """Weighted sum of each token's experts, in the type of `tokens`."""
        chosen = expert_indices.flatten()
        # Stable, so that the order of sums does not depend on the sort.
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)
        rows = experts(tokens[order // expert_indices.shape[1]], counts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        results = rows[place].unflatten(0, expert_indices.shape)
        wide = torch.promote_types(rows.dtype, torch.float32)
        combined: Tensor = (results.to(wide) * expert_weights.unsqueeze(-1)).sum(1)
        return combined.to(tokens.dtype)
