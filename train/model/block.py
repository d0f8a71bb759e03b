"""One transformer block: memory, attention, feed-forward; called by `transformer` and `mtp`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.model.attention.compressed import HybridAttention
from train.model.attention.dsa import SparseLatentAttention
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.engram import Engram
from train.model.ffn import FeedForward
from train.model.moe.layer import MoeLayer
from train.model.norm import RMSNorm
from train.model.residual import build_site
from train.model.streams import Streams
from train.model.tokens import Tokens


class Block(nn.Module):
    """Pre-norm block; both sub-layers read from and write to the residual streams by a site.

    Args:
        config: the model.
        layer_index: place in the network from 0; MTP blocks follow the layers.
        engram: memory that is added before the attention, if this layer has one.
    """

    def __init__(self, config: ModelConfig, layer_index: int, engram: Engram | None = None) -> None:
        super().__init__()
        self.engram = engram
        self.recompute = False
        """Keep only what enters the block, and repeat it in backward."""
        self.attention_site = build_site(config, 2 * layer_index)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = build_attention(config, layer_index)
        self.ffn_site = build_site(config, 2 * layer_index + 1)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: FeedForward | MoeLayer
        if layer_index < config.num_dense_layers:
            self.ffn = FeedForward(
                config.hidden_size, config.intermediate_size, config.swiglu_limit
            )
        else:
            self.ffn = MoeLayer(config, layer_index)

    def forward(
        self,
        streams: Streams,
        tokens: Tokens,
    ) -> Streams:
        """Transform the streams, which hold `tokens.part`."""
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random.
            left: Streams = checkpoint(
                self.compute, streams, tokens, use_reentrant=False, preserve_rng_state=False
            )
            return left
        return self.compute(streams, tokens)

    def compute(self, streams: Streams, tokens: Tokens) -> Streams:
        """Memory, attention, feed-forward."""
        if self.engram is not None:
            streams = streams.moved_to(self.engram(streams.x, tokens))
        hidden, maps = self.attention_site(streams)
        output = self.attention(self.attention_norm(hidden), tokens)
        streams = self.attention_site.write(output, maps)
        hidden, maps = self.ffn_site(streams)
        return self.ffn_site.write(self._feed_forward(self.ffn_norm(hidden), tokens), maps)

    def _feed_forward(
        self, x: Float[Tensor, "batch part hidden"], tokens: Tokens
    ) -> Float[Tensor, "batch part hidden"]:
        """A rank computes its own tokens with experts, and its channels of all queries without."""
        if isinstance(self.ffn, MoeLayer):
            output: Tensor = self.ffn(x, tokens)
            return output
        return tokens.part.scatter_queries(self.ffn(tokens.part.gather_queries(x)))


def build_attention(
    config: ModelConfig, layer_index: int
) -> MultiHeadLatentAttention | HybridAttention:
    """The attention that the configuration names for a layer."""
    if config.attention == "v4_hybrid":
        return HybridAttention(config, layer_index)
    kinds = {"mla": MultiHeadLatentAttention, "dsa": SparseLatentAttention}
    return kinds[config.attention](config)
