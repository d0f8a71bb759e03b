"""Token embedding and output head: the two ends of the model, called by `transformer` only.

They are two parameters (untied), as in DeepSeek-V3. MTP shares both; it is handed the results.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """One row of `hidden_size` numbers per token of the vocabulary.

    `lookup` may be replaced by one that knows which rows are on this rank.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """Look the rows up."""
        return self.lookup(input_ids, self.weight)


class OutputHead(nn.Module):
    """Scores of all tokens of the vocabulary: `hidden @ weight^T`."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(
        self, hidden: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq vocab"]:
        """Project; the logits have the type of `hidden`."""
        return F.linear(hidden, self.weight)
