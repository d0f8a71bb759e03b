"""What every indexer shares: its stage, how its loss joins, and what is counted; base of `dsa`'s.

The two training stages of DeepSeek-V3.2-Exp, section 2.1.1. `train.step` sets the scale of the loss
and takes the sums; `Transformer.set_indexer_stage` sets the stage and freezes what does not learn.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.model.add_loss import add_loss
from train.model.attention.config import IndexerConfig, IndexerStage


class TrainedIndexer(nn.Module):
    """Base of a lightning indexer. Its input must be detached: it learns from its own loss only."""

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.stage: IndexerStage = config.stage
        """See `IndexerConfig.stage`."""
        self.loss_scale = 0.0
        """Weight of the loss over the tokens of the global batch; set by the step."""
        self._sums: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss is computed now: in training, with gradients, and not idle."""
        return self.training and torch.is_grad_enabled() and self.stage != "dense"

    def selects_among(self, keys: int) -> bool:
        """Whether attention is to a selection of so many keys now, and not to all of them."""
        return self.stage == "sparse" and self.top_k < keys

    def fp32_modules(self) -> list[nn.Module]:
        """Modules that keep fp32 parameters when the model computes in bf16."""
        raise NotImplementedError

    def join(
        self,
        output: Float[Tensor, "*shape"],
        divergence: Float[Tensor, ""],
        recall: Float[Tensor, "3"],
    ) -> Float[Tensor, "*shape"]:
        """The attention's output, through which the loss joins the gradient; counts both.

        Args:
            output: of the attention layer.
            divergence: `IndexerLoss.total`, summed over this microbatch's queries.
            recall: sums of `topk_recall` over some of them.
        """
        seen = torch.cat([divergence.detach().view(1), recall.to(divergence.dtype)])
        self._sums = seen if self._sums is None else self._sums + seen
        return add_loss(output, self.loss_scale * divergence)

    def take_sums(self) -> Float[Tensor, "4"]:
        """Divergence (nats) and the three sums of `topk_recall` since the last call; starts over."""
        taken, self._sums = self._sums, None
        return torch.zeros(4) if taken is None else taken
