"""Whether the residual streams are stable: the gains of hyper-connections.

The measure is that of the mHC paper (arXiv 2512.24880, section 3.1, figures 3 and 7). With H_l the
residual map of site l for one token (attention and feed-forward are sites of their own):

    gain of a map P     forward max_i |sum_j P_ij|, backward max_j |sum_i P_ij|, a mean over tokens
    composite from l    P_l = H_{L-1} ... H_l: what becomes of a signal that enters at site l

through all pipeline stages; the sites of MTP are apart. A maximum cannot show a signal that dies
out, so the minima are watched as well. The paper's figure 8 averages the maps over the tokens
first; both are here.

The tokens are those of the last sequence of the global batch, the same in every layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from data.packing import Batch
from parallel.collectives import sum_over
from train.metrics import Record
from train.model.block import Block
from train.model.hyper_connection import HyperConnection, ManifoldHyperConnection
from train.model.residual import PlainResidual
from train.model.streams import num_streams
from train.training import Training

_GAINS = ("forward", "backward", "forward_min", "backward_min")
_PER_MAP = (*_GAINS, "error")


def build_monitor(training: Training) -> "ResidualMonitor | None":
    """The monitor, if the model has residual maps and the recipe wants it."""
    every = training.config.monitor.residual_every_steps
    if training.config.model.residual == "plain" or not every:
        return None
    return ResidualMonitor(training, every)


def gains(maps: Float[Tensor, "tokens n n"]) -> Float[Tensor, "tokens 5"]:
    """Gains of each map, as `_PER_MAP`: the last is its distance from doubly stochastic."""
    rows, columns = maps.sum(-1), maps.sum(-2)
    forward, backward = rows.abs(), columns.abs()
    error = torch.maximum((rows - 1).abs().amax(-1), (columns - 1).abs().amax(-1))
    return torch.stack(
        [forward.amax(-1), backward.amax(-1), forward.amin(-1), backward.amin(-1), error], dim=-1
    )


@dataclass(frozen=True)
class _SiteSums:
    """Sums over tokens of one site, in one row."""

    n: int

    @property
    def width(self) -> int:
        return 2 + 2 * len(_PER_MAP) + self.n**2

    def of(self, map_: Tensor, composite: Tensor, square: Tensor) -> Tensor:
        """Tokens, square of the streams, gains of the map and of the composite, the composite."""
        count = square.new_tensor([len(square)])
        parts = [count, square.sum().unsqueeze(0), gains(map_).sum(0), gains(composite).sum(0)]
        return torch.cat([*parts, composite.sum(0).flatten()])


class ResidualMonitor:
    """Gains of the residual maps in one step of every `every`.

    Communication in such a step: one sum over the pipeline of a map for each stage and token.
    """

    def __init__(self, training: Training, every: int) -> None:
        self._training, self._every, self._active = training, every, False
        self._rows = _SiteSums(num_streams(training.config.model))
        self._num_sites = 2 * training.config.model.num_layers
        # The data rank whose last sequence is the last one of the global batch.
        self._samples = training.data_rank == training.data_size - 1

    def start(self, step: int, batch: Batch) -> None:
        """Let the sites keep their maps in a step that is watched."""
        self._active = step % self._every == 0
        for site in self._sites().values():
            site.capture = self._active and self._samples

    def sums(self, like: Float[Tensor, "_"]) -> Float[Tensor, "sums"]:
        """For every site of the network the sums over this rank's tokens; nothing between."""
        if not self._active:
            return like.new_zeros(0)
        table = like.new_zeros(self._num_sites, self._rows.width)
        if self._samples:
            self._fill(table)
        for site in self._sites().values():
            site.capture = False
        return table.flatten()

    def _fill(self, table: Float[Tensor, "sites width"]) -> None:
        """Walk this rank's stages from their ends, carrying the product of what lies behind."""
        captured = {place: site.take_captured() for place, site in self._sites().items()}
        behind = self._products_behind({place: maps for place, (maps, _) in captured.items()})
        for stage in self._training.model.stages:
            last = 2 * max(map(int, stage.layers)) + 1
            composite = behind(last)
            for place in range(last, 2 * min(map(int, stage.layers)) - 1, -1):
                maps, square = captured[place]
                composite = composite @ maps
                table[place] = self._rows.of(maps, composite, square).to(table)

    def _products_behind(self, maps: dict[int, Tensor]) -> Callable[[int], Tensor]:
        """Product of the maps of all sites behind a stage that ends with site `last`."""
        like = next(iter(maps.values()))
        identity = torch.eye(self._rows.n, dtype=like.dtype, device=like.device)
        unit = identity.expand(like.shape)
        pipeline = self._training.pipeline
        if pipeline is None:
            return lambda last: unit
        ends = [2 * layers.stop - 1 for layers in pipeline.stages.layers]
        products = like.new_zeros(len(ends), *like.shape)
        for stage in self._training.model.stages:
            places = range(2 * min(map(int, stage.layers)), 2 * max(map(int, stage.layers)) + 2)
            product = unit
            for place in places:
                product = maps[place] @ product
            products[ends.index(places[-1])] = product
        products = sum_over(products, self._training.meshes.pp.get_group(), "pp")

        def behind(last: int) -> Tensor:
            product = unit
            for following in products[ends.index(last) + 1 :]:
                product = following @ product
            return product

        return behind

    def record(self, sums: Float[Tensor, "sums"]) -> Record:
        """Metrics: the worst site of each kind, and all gains by site."""
        if not len(sums):
            return {}
        table = sums.view(self._num_sites, self._rows.width)
        table = table[:, 1:] / table[:, :1]
        rms = table[:, 0].sqrt()
        kinds, n = len(_PER_MAP), self._rows.n
        single, composite = table[:, 1 : 1 + kinds], table[:, 1 + kinds : 1 + 2 * kinds]
        means = table[:, 1 + 2 * kinds :].view(-1, n, n)
        record: Record = {
            "mhc/doubly_stochastic_error": single[:, -1].max().item(),
            "mhc/stream_norm_ratio": (rms[-1] / rms[0]).item(),
        }
        for index, name in enumerate(("forward", "backward")):
            record |= {
                f"mhc/gain_{name}_max": single[:, index].max().item(),
                f"mhc/gain_{name}_min": single[:, index + 2].min().item(),
                f"mhc/composite_gain_{name}": composite[:, index].max().item(),
                f"mhc/composite_gain_{name}_min": composite[:, index + 2].min().item(),
                f"mhc/composite_of_mean_{name}": gains(means)[:, index].max().item(),
            }
        for site in range(self._num_sites):
            for index, name in enumerate(("forward", "backward")):
                record[f"mhc/site_{site:03d}/gain_{name}"] = single[site, index].item()
                record[f"mhc/site_{site:03d}/composite_{name}"] = composite[site, index].item()
            record[f"mhc/site_{site:03d}/stream_rms"] = rms[site].item()
        return record

    def _sites(self) -> dict[int, HyperConnection | ManifoldHyperConnection]:
        """The sites of this rank's stages by their place in the network, without those of MTP."""
        found: dict[int, HyperConnection | ManifoldHyperConnection] = {}
        for stage in self._training.model.stages:
            for layer, block in stage.layers.items():
                assert isinstance(block, Block), layer
                for half, site in enumerate((block.attention_site, block.ffn_site)):
                    assert not isinstance(site, PlainResidual), layer
                    found[2 * int(layer) + half] = site
        return found
