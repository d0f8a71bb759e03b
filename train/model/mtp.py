"""Multi-token prediction of DeepSeek-V3 (arXiv 2412.19437, section 2.2); called by `transformer`.

The module owns neither embedding nor head: `transformer` looks up the next tokens and projects the
result, so that both stay one parameter. `train.step` scores it with `mtp_labels`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.block import Block
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.residual import expand_streams, num_streams, read_out


class MultiTokenPrediction(nn.Module):
    """One more token: `h' = block(project [norm(h) ; norm(embedding of token t+1)])` (eq. 21-22).

    At position t the main model predicts token t+1; this module is told token t+1 and predicts
    token t+2. h is the main model's read-out before its final norm; the module has its own.
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.streams = num_streams(config)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.embedding_norm = RMSNorm(hidden, eps)
        self.project = nn.Linear(2 * hidden, hidden, bias=False)
        self.block = block
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        next_embedding: Float[Tensor, "batch seq hidden"],
        next_ids: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        *,
        pair_positions: Int[Tensor, "batch seq pairs"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """What the shared head projects to the logits of token t+2.

        Args:
            hidden: read-out of the main model.
            next_embedding: shared embedding of `next_ids`.
            next_ids: token t+1, see `next_tokens`.
            position_ids: those of the main model.
            document_ids: those of the main model.
            pair_positions: those of the main model.
        """
        both = torch.cat([self.hidden_norm(hidden), self.embedding_norm(next_embedding)], dim=-1)
        stream = expand_streams(self.project(both), self.streams)
        stream = self.block(
            stream, next_ids, position_ids, document_ids, pair_positions=pair_positions
        )
        normalised: Tensor = self.norm(read_out(stream))
        return normalised


def next_tokens(
    input_ids: Int[Tensor, "batch seq"], document_ids: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"]:
    """Token t+1 of the same document at position t; where there is none, token t itself.

    Those positions have no MTP label, and nothing of the next document leaks into this one.
    """
    shifted = input_ids.clone()
    same = document_ids[:, 1:] == document_ids[:, :-1]
    shifted[:, :-1] = torch.where(same, input_ids[:, 1:], input_ids[:, :-1])
    return shifted


def mtp_labels(
    labels: Int[Tensor, "batch seq"], document_ids: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"]:
    """Labels of `mtp_logits[0]`: token t+2 at position t.

    Args:
        labels: token t+1 at position t, -100 where there is none.
        document_ids: document of each token.

    Returns:
        -100 where token t+1 is not in the sequence and document, or token t+2 has no label.
    """
    further = torch.full_like(labels, -100)
    same = document_ids[:, 1:] == document_ids[:, :-1]
    further[:, :-1] = torch.where(same, labels[:, 1:], -100)
    return further
