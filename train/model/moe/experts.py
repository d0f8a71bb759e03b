"""The routed experts of one layer, held by `layer`; expert parallelism cuts them along dim 0."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.grouped import GroupedLinear, grouped_mm
from train.model.ffn import swiglu
from train.model.moe.config import MoeConfig


class Experts(nn.Module):
    """SwiGLU experts stacked on dim 0; the gate rows of `gate_up` come before the up rows.

    `grouped_linear` may be replaced by another kernel, see `parallel.grouped`.
    """

    def __init__(self, config: MoeConfig, hidden_size: int, limit: float | None) -> None:
        super().__init__()
        experts, width = config.num_experts, config.expert_intermediate_size
        self.limit = limit
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))
        self.grouped_linear: GroupedLinear = grouped_mm

    def forward(
        self, rows: Float[Tensor, "rows hidden"], counts: Int[Tensor, "local_experts"]
    ) -> Float[Tensor, "rows hidden"]:
        """Apply each expert to its rows.

        Also on no rows the output stays connected to the input: with expert parallelism the graph
        must reach the exchange on every rank, or the others wait for it in backward.

        Args:
            rows: sorted by expert.
            counts: rows of each expert.
        """
        gate, up = self.grouped_linear(rows, self.gate_up, counts).chunk(2, dim=-1)
        return self.grouped_linear(swiglu(gate, up, self.limit), self.down, counts)
