"""The whole model: embedding, blocks, head; built by `train.build`, called by `train.microbatches`.

Reads like the papers and knows no ranks. Parallelism is applied from outside to what `parts()`
names; where communication cannot be avoided an attribute is replaced: `Transformer.split`,
`TokenEmbedding.lookup`, `MoeLayer.dispatch` and `Engram.lookup`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.vision import VisionInput
from parallel.apply import ModelParts
from parallel.sequence import SequenceSplit
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import IndexerStage
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.attention.trained_indexer import TrainedIndexer
from train.model.block import Block
from train.model.config import ModelConfig, Recompute
from train.model.embedding import OutputHead, TokenEmbedding
from train.model.engram import Engram
from train.model.engram_hash import hash_geometries
from train.model.hyper_connection import GatedReadOut
from train.model.moe.layer import MoeLayer
from train.model.mtp import build_mtp
from train.model.multimodal.placeholders import PlacedRows
from train.model.multimodal.tower import VisionTower
from train.model.norm import RMSNorm
from train.model.recompute import segment_length
from train.model.residual import build_read_out
from train.model.rotary import axis_positions
from train.model.rules import violations
from train.model.streams import Handover, expand_streams, num_streams
from train.model.tensor_parallel import column_parallel, row_parallel
from train.model.tokens import Tokens


@dataclass(frozen=True)
class TransformerOutput:
    """Logits at the places of this rank's queries, of the tokens that its head holds."""

    logits: Float[Tensor, "batch queries vocab"]
    """Of token t+1 at position t."""
    mtp_logits: tuple[Float[Tensor, "batch queries vocab"], ...] = ()
    """Of token t+2 at position t; empty without MTP. See `train.model.mtp.mtp_labels`."""


class Transformer(nn.Module):
    """Decoder with the switches of the V4 stack, or some consecutive layers of it: a pipeline stage.

    Blocks are keyed by their global index, so that a parameter has one name in every layout. The
    stage of the first layer has the embedding and the vision tower, that of the last one the head
    and MTP. Parameters are uninitialised: `train.model.initialize` says what they start as.

    Args:
        config: the model.
        layers: of this stage, at least one; None: all.

    Raises:
        ValueError: the configuration asks for something that is not there; all rules at once.
    """

    embedding: TokenEmbedding
    """Of the first stage only."""
    head: OutputHead
    """Of the last stage only, as its `read_out` and `norm`."""

    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        super().__init__()
        if found := violations(config):
            raise ValueError("\n".join(found))
        layers = range(config.num_layers) if layers is None else layers
        self.config = config
        self.split = SequenceSplit()
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.blocks_per_segment: int | None = None
        """Keep the streams at every so many blocks only, see `StreamSegment`; None: at all."""
        self.vision: VisionTower | None = None
        if self.is_first:
            self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        if self.is_first and config.vision is not None:
            self.vision = VisionTower(config.vision, config.hidden_size, config.rms_norm_eps)
        memories = _build_engrams(config, layers)
        self.layers = nn.ModuleDict({str(i): Block(config, i, memories.get(i)) for i in layers})
        if self.is_last:
            self.read_out = build_read_out(config)
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.head = OutputHead(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            build_mtp(config, Block(config, config.num_layers + depth))
            for depth in range(config.mtp_depth if self.is_last else 0)
        )
        self.indexer_stage: IndexerStage | None = None
        """None without indexers in any layer of the model."""
        if config.num_indexers:
            self.set_indexer_stage(config.indexer.stage)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        images: VisionInput | None = None,
        received: Handover | None = None,
        *,
        first_sequence: int = 0,
    ) -> TransformerOutput | Handover:
        """Logits of the next tokens; of a stage that is not the last, what the next one takes.

        Args:
            input_ids: tokens of packed documents.
            position_ids: place of each token in its document.
            document_ids: document of each token; no token sees another document.
            images: what the placeholders among the tokens stand for; `check_images` has passed.
            received: from the stage before; None: this is the first.
            first_sequence: place of the first sequence among all that the rank has in the step, for
                what is injected.
        """
        pair_positions = self._pair_positions(images, input_ids.device)
        part = self.split.of(input_ids.shape[1])
        tokens = Tokens(input_ids, position_ids, document_ids, part, pair_positions, first_sequence)
        streams, next_embeddings = received or self._enter(tokens, images)
        for number, layer in enumerate(self.layers.values()):
            if self.blocks_per_segment and number % self.blocks_per_segment == 0:
                streams = streams.in_new_segment()
            streams = layer(streams, tokens)
        left = Handover(streams.without_segment(), next_embeddings)
        return self._leave(left, tokens) if self.is_last else left

    def _enter(self, tokens: Tokens, images: VisionInput | None) -> Handover:
        """The embedding in every stream, and those of the further tokens that MTP is told."""
        rows = self._rows(tokens.input_ids, images)
        streams = expand_streams(self._embed(tokens, rows), self.config)
        next_embeddings = []
        for _ in range(self.config.mtp_depth):
            tokens = tokens.next()
            rows = None if rows is None else rows.next(tokens.document_ids)
            next_embeddings.append(self._embed(tokens, rows))
        return Handover(streams, tuple(next_embeddings))

    def _leave(self, left: Handover, tokens: Tokens) -> TransformerOutput:
        """Logits of the main model and of MTP."""
        hidden = self.read_out(left.streams)
        logits = self.head(tokens.part.gather_queries(self.norm(hidden)))
        mtp_logits = []
        for module, embedding in zip(self.mtp, left.next_embeddings, strict=True):
            tokens = tokens.next()
            predicted = module(hidden, left.streams, embedding, tokens)
            mtp_logits.append(self.head(tokens.part.gather_queries(predicted)))
        return TransformerOutput(logits, tuple(mtp_logits))

    def _rows(
        self, input_ids: Int[Tensor, "batch seq"], images: VisionInput | None
    ) -> PlacedRows | None:
        """The images at their placeholders; None if the model takes text only."""
        if self.vision is None:
            assert images is None, "check_images refuses images without model.vision"
            return None
        # Without images the tower runs all the same: the ranks of a sharded model call it together.
        none = self.vision.nothing()
        patches, grids = none if images is None else (images.patches, images.grids)
        placeholders = input_ids == self.vision.placeholder_token_id
        return PlacedRows.of(self.vision(patches, grids), placeholders)

    def _pair_positions(
        self, images: VisionInput | None, device: torch.device
    ) -> Int[Tensor, "batch seq pairs"] | None:
        """What each rotary pair turns by; None: by the place in the document."""
        if self.config.vision is None or images is None:
            return None
        return axis_positions(images.rope_positions.to(device), self.config.vision.rope_sections)

    def _embed(self, tokens: Tokens, rows: PlacedRows | None) -> Float[Tensor, "batch part hidden"]:
        """Vectors of this rank's tokens, those of placeholders from the images."""
        part = tokens.part
        embedding = part.scatter_queries(self.embedding(part.take_queries(tokens.input_ids)))
        return embedding if rows is None else rows.replace_in(embedding, part)

    def recompute(self, kind: Recompute) -> None:
        """Say what the backward pass computes again: see `TrainConfig.recompute`."""
        for block in self.blocks():
            block.recompute = kind == "full"
        self.blocks_per_segment = None
        if kind == "streams":
            self.blocks_per_segment = segment_length(len(self.layers), num_streams(self.config))

    def blocks(self) -> list[Block]:
        """All blocks, those of MTP last."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def moe_layers(self) -> list[MoeLayer]:
        """The mixture-of-experts layers, in order, those of MTP last."""
        return [block.ffn for block in self.blocks() if isinstance(block.ffn, MoeLayer)]

    def indexers(self) -> list[TrainedIndexer]:
        """The indexers of sparse attention, in order, those of MTP last."""
        return [module for module in self.modules() if isinstance(module, TrainedIndexer)]

    def set_indexer_stage(self, stage: IndexerStage) -> None:
        """Go on in another stage of sparse attention: see `IndexerConfig.stage`.

        May be called between optimizer steps, on every rank alike, also on a sharded model. Names
        and number of the parameters stay; `requires_grad` says which of them learn.

        Raises:
            ValueError: the model's attention has no indexer.
        """
        if not self.config.num_indexers:
            raise ValueError(
                f"model.indexer.stage={stage}: model.attention={self.config.attention} has no "
                "indexer; use model.attention=dsa, or v4_hybrid with layers of "
                "model.compressed.csa_ratio"
            )
        self.indexer_stage = stage
        indexers = self.indexers()
        for indexer in indexers:
            indexer.stage = stage
        theirs = {id(p) for indexer in indexers for p in indexer.parameters()}
        for parameter in self.parameters():
            is_indexer = id(parameter) in theirs
            learns = stage == "sparse" or is_indexer == (stage == "dense_warmup")
            parameter.requires_grad_(learns)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but the indexers learns: also what is not moved by gradients stays."""
        return self.indexer_stage == "dense_warmup"

    def engram_layers(self) -> dict[int, Engram]:
        """The memories, by layer index."""
        return {
            int(index): module
            for index, block in self.layers.items()
            for module in block.children()
            if isinstance(module, Engram)
        }

    def remove_tables(self) -> None:
        """Leave the rows of the memories to `Engram.lookup`: they are no parameters any more."""
        for engram in self.engram_layers().values():
            engram.table = None

    def parts(self) -> ModelParts:
        """What parallelism is applied to.

        Embedding, head and everything else outside a block belong to the root: MTP uses them
        within the root's forward pass. An MTP module is a block. The modules of `fp32_modules`,
        grouped by block, keep fp32 parameters; they take and return the stream in its own type,
        so their inputs must not be cast.
        """
        tower = self.vision.units() if self.vision is not None else ()
        embedding = self.embedding if self.is_first else None
        ends = [*([embedding] if embedding else []), *([self.head] if self.is_last else [])]
        return ModelParts(
            root=self,
            blocks=[*tower, *self.layers.values(), *self.mtp],
            expert_modules=[moe.experts for moe in self.moe_layers()],
            dispatch_sites=list(self.moe_layers()),
            attention_sites=[
                block.attention
                for block in self.blocks()
                if isinstance(block.attention, MultiHeadLatentAttention)
            ],
            num_experts=self.config.moe.num_experts if self.config.num_moe_layers else 1,
            sequence_site=self,
            column_parallel=[*ends, *column_parallel(self.blocks())],
            row_parallel=list(row_parallel(self.blocks())),
            embedding=embedding,
            fp32_modules=[
                *(group for block in self.blocks() if (group := _fp32_modules(block))),
                *([module] for module in self.modules() if isinstance(module, GatedReadOut)),
            ],
        )


def _build_engrams(config: ModelConfig, layers: range) -> dict[int, Engram]:
    """The memories of these layers, by index."""
    if config.engram is None:
        return {}
    return {
        index: Engram(
            config.engram,
            geometry,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            streams=num_streams(config),
            eps=config.rms_norm_eps,
            dead_token_id=config.vision.placeholder_token_id if config.vision else None,
        )
        for index, geometry in hash_geometries(config.engram).items()
        if index in layers
    }


def _fp32_modules(block: Block) -> list[nn.Module]:
    """Modules of a block whose few parameters decide much: sites, sink, pooling, and router."""
    attention = [
        module
        for owner in block.modules()
        if isinstance(owner, HybridAttention | TrainedIndexer)
        for module in owner.fp32_modules()
    ]
    routers = [block.ffn.router] if isinstance(block.ffn, MoeLayer) else []
    modules = [block.attention_site, *attention, block.ffn_site, *routers]
    return [module for module in modules if any(True for _ in module.parameters())]
