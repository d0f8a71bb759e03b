"""How a sub-layer reads from the residual streams and writes back; called by `block` and the model.

Around each sub-layer F stands one site, of the kind `model.residual`:

    layer_input, maps = site(streams)
    streams = site.write(F(layer_input), maps)

`Streams` is what travels between sites, blocks and pipeline stages: see `streams`. After the last
block a read-out makes one hidden state of it.
"""

from jaxtyping import Float
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.hyper_connection import GatedReadOut, HyperConnection, ManifoldHyperConnection
from train.model.streams import Streams, num_streams


class PlainResidual(nn.Module):
    """`x + F(x)`: one stream, no parameters."""

    def forward(self, streams: Streams) -> tuple[Float[Tensor, "batch seq hidden"], Streams]:
        """The input of the sub-layer, and the stream for `write`."""
        return streams.x.squeeze(2), streams

    def write(self, output: Float[Tensor, "batch seq hidden"], streams: Streams) -> Streams:
        """Add the sub-layer's output."""
        return Streams(streams.x + output.unsqueeze(2))


class MeanReadOut(nn.Module):
    """Leave the network by the mean of the streams.

    HC (arXiv 2409.19606) publishes the sum. The RMSNorm that follows makes both the same network
    (up to its eps); the mean keeps the scale of the plain residual.
    """

    def forward(self, streams: Streams) -> Float[Tensor, "batch seq hidden"]:
        """The hidden state that the final norm takes."""
        return streams.x.mean(dim=2)


Site = PlainResidual | HyperConnection | ManifoldHyperConnection
ReadOut = MeanReadOut | GatedReadOut


def build_site(config: ModelConfig, site_index: int) -> Site:
    """The residual site of one sub-layer; sites are counted through the network from 0."""
    if config.residual == "plain":
        return PlainResidual()
    if config.residual == "hc":
        return HyperConnection(config, site_index)
    return ManifoldHyperConnection(config)


def build_read_out(config: ModelConfig) -> ReadOut:
    """The read-out of the model or of an MTP module; a single stream is its own."""
    if config.hyper_connection.read_out == "mean" or num_streams(config) == 1:
        return MeanReadOut()
    return GatedReadOut(config)
