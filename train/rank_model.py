"""The model on one rank: what step, optimizer, checkpoint and evaluation take for "the model"."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from parallel.sequence import SequenceSplit
from train.model.attention.config import IndexerStage
from train.model.attention.trained_indexer import TrainedIndexer
from train.model.config import ModelConfig
from train.model.engram import Engram
from train.model.moe.layer import MoeLayer
from train.model.transformer import Transformer


class RankModel:
    """The whole model, or the pipeline stages that this rank computes.

    Parameters and buffers have the names of the whole model, whichever rank has them.

    Args:
        stages: in the order of the network.
    """

    def __init__(self, stages: Sequence[Transformer]) -> None:
        self.stages = list(stages)

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""
        return self.stages[0].config

    @property
    def split(self) -> SequenceSplit:
        """How sequences are spread over ranks."""
        return self.stages[0].split

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of all stages here."""
        return (named for stage in self.stages for named in stage.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those of all stages here."""
        return (named for stage in self.stages for named in stage.named_buffers())

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of all stages here."""
        return {name: value for stage in self.stages for name, value in stage.state_dict().items()}

    def moe_layers(self) -> list[MoeLayer]:
        """The mixture-of-experts layers here, in order."""
        return [layer for stage in self.stages for layer in stage.moe_layers()]

    def indexers(self) -> list[TrainedIndexer]:
        """The indexers of sparse attention here, in order."""
        return [indexer for stage in self.stages for indexer in stage.indexers()]

    def engram_layers(self) -> dict[int, Engram]:
        """The memories here, by layer index, in order."""
        return {
            layer: engram
            for stage in self.stages
            for layer, engram in stage.engram_layers().items()
        }

    @property
    def indexer_stage(self) -> IndexerStage | None:
        """Training stage of sparse attention, the same on all ranks; None without indexers."""
        return self.stages[0].indexer_stage

    def set_indexer_stage(self, stage: IndexerStage) -> None:
        """Go on in another stage of sparse attention: see `Transformer.set_indexer_stage`."""
        for part in self.stages:
            part.set_indexer_stage(stage)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but the indexers learns, the same on all ranks."""
        return self.stages[0].is_frozen

    def train(self) -> None:
        """Go into training mode."""
        for stage in self.stages:
            stage.train()

    def eval(self) -> None:
        """Go into evaluation mode."""
        for stage in self.stages:
            stage.eval()
