"""Multi-token prediction of DeepSeek-V3 and of V4; called by `transformer`.

The module owns neither embedding nor head: `transformer` looks up the next tokens and projects the
result, so that both stay one parameter. `train.step` scores it with `mtp_labels`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.block import Block
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.residual import build_read_out
from train.model.streams import Streams, expand_streams
from train.model.tokens import Tokens


class MultiTokenPrediction(nn.Module):
    """One more token: told token t+1, which the main model predicts at position t, predict t+2.

    The kinds differ in what they `enter` into the block.

    Args:
        config: the model.
        block: its own transformer block.
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__()
        self.config = config
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block = block
        self.read_out = build_read_out(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def enter(self, hidden: Tensor, streams: Streams, embedding: Tensor) -> Streams:
        """The block's input from the main model's state and the normalised embedding."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        streams: Streams,
        next_embedding: Float[Tensor, "batch seq hidden"],
        next_tokens: Tokens,
    ) -> Float[Tensor, "batch seq hidden"]:
        """What the shared head projects to the logits of token t+2.

        Args:
            hidden: read-out of the main model, before its final norm.
            streams: of the main model, after its last block.
            next_embedding: shared embedding of `next_tokens`.
            next_tokens: those of the main model, one further.
        """
        entered = self.enter(hidden, streams, self.embedding_norm(next_embedding))
        normalised: Tensor = self.norm(self.read_out(self.block(entered, next_tokens)))
        return normalised


class ConcatenatedPrediction(MultiTokenPrediction):
    """V3 (arXiv 2412.19437, eq. 21-22): `h' = block(project [norm(h) ; norm(embedding)])`.

    h is the read-out of the main model; all streams of the block start as the same projection.
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__(config, block)
        self.project = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def enter(self, hidden: Tensor, streams: Streams, embedding: Tensor) -> Streams:
        """The projection, in every stream."""
        both = torch.cat([self.hidden_norm(hidden), embedding], dim=-1)
        return expand_streams(self.project(both), self.config)


class StreamPrediction(MultiTokenPrediction):
    """V4 (its released code): `x'_m = e_proj(norm(embedding)) + h_proj(norm(x_m))` per stream m.

    All streams share both projections and the norm; with single-pass mHC the block reads by the
    coefficients of the main model's last site.
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__(config, block)
        self.embedding_project = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.hidden_project = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def enter(self, hidden: Tensor, streams: Streams, embedding: Tensor) -> Streams:
        """Every stream of the main model, and the embedding."""
        projected = self.hidden_project(self.hidden_norm(streams.x))
        return streams.moved_to(projected + self.embedding_project(embedding).unsqueeze(2))


def build_mtp(config: ModelConfig, block: Block) -> MultiTokenPrediction:
    """The module of kind `model.mtp_kind` around its block."""
    kind = StreamPrediction if config.mtp_kind == "v4" else ConcatenatedPrediction
    return kind(config, block)


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
