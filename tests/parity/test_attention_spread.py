"""Attention layers whose tokens and heads are spread over ranks: the numbers of one rank, in fp64.

Heads are cut by hand here, as tensor parallelism cuts them. Documents span ranks, end where a run
ends, and runs are shorter than what their first token looks back at.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.apply import sequence_split
from parallel.config import ContextSplit
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from parallel.sequence import SequencePart
from tests.harness import run_distributed
from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY
from train.model.attention import compressed
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import CompressedConfig, IndexerConfig, IndexerStage
from train.model.attention.dsa import SparseLatentAttention
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.attention.trained_indexer import TrainedIndexer
from train.model.tokens import Tokens

LENGTH = 48
DOCUMENTS = ((5, 19, 12, 3, 9), (48,), (7, 1, 1, 20, 19))
STAGES: tuple[IndexerStage, ...] = ("dense", "dense_warmup", "sparse")
CONFIG = replace(
    TINY,
    num_attention_heads=4,
    # Many heads: a score of 0, where all rectify, is a tie.
    indexer=IndexerConfig(num_heads=16, head_dim=8, top_k=2),
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 8),
        hca_ratio=8,
        q_lora_rank=16,
        head_dim=8,
        rope_head_dim=4,
        output_groups=4,
        output_lora_rank=12,
    ),
)
CUT = {
    "q.weight": 0,
    "q_b.weight": 0,
    "kv_b.weight": 0,
    "o.weight": 1,
    "sink.logits": 0,
    "o_a.weight": 0,
    "o_b.weight": 1,
}
"""Dimension by which a weight is cut over the tensor-parallel ranks; the others all ranks have."""


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and directions for the outputs; positions and documents."""
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS]
    )
    documents = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in DOCUMENTS]
    )
    generator = torch.Generator().manual_seed(1)
    shape = (2, len(DOCUMENTS), LENGTH, CONFIG.hidden_size)
    x, direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, direction, positions, documents


def layers() -> Iterator[tuple[str, nn.Module]]:
    """Every attention, in every stage and form."""
    yield "mla", MultiHeadLatentAttention(CONFIG)
    no_rank = replace(CONFIG, mla=replace(CONFIG.mla, q_lora_rank=None))
    yield "mla without a query rank", MultiHeadLatentAttention(no_rank)
    for stage in STAGES:
        for top_k in (2, 10) if stage == "sparse" else (2,):
            indexer = replace(CONFIG.indexer, stage=stage, top_k=top_k)
            yield f"dsa {stage} {top_k}", SparseLatentAttention(replace(CONFIG, indexer=indexer))
            for window in (3, 20) if stage == "sparse" else (6,):
                v4 = replace(CONFIG.compressed, sliding_window=window)
                config = replace(CONFIG, indexer=indexer, compressed=v4)
                yield f"csa {stage} {top_k} {window}", HybridAttention(config, 1)
                if stage == "sparse" and top_k == 2:
                    yield f"window {window}", HybridAttention(config, 0)
                    yield f"hca {window}", HybridAttention(config, 2)


def filled(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    for indexer in layer.modules():
        if isinstance(indexer, TrainedIndexer):
            indexer.loss_scale = 0.5
    return layer


def results(layer: nn.Module, x: Tensor, direction: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Output, gradients and what the indexer counted."""
    x = x.clone().requires_grad_()
    out = layer(x, tokens)
    torch.autograd.backward((out * direction).sum())
    assert x.grad is not None
    found = {"output": out.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for indexer in layer.modules():
        if isinstance(indexer, TrainedIndexer):
            found["sums"] = indexer.take_sums().double()
    return found


def keep_own_heads(layer: nn.Module, rank: int, ranks: int) -> None:
    for name, dim in CUT.items():
        owner, _, last = name.rpartition(".")
        if name in dict(layer.named_parameters()):
            module = layer.get_submodule(owner)
            piece = getattr(module, last).detach().chunk(ranks, dim)[rank].clone()
            module.register_parameter(last, nn.Parameter(piece))


def check_layer(
    name: str, layer: nn.Module, part: SequencePart, tensor: int, inputs: tuple[Tensor, ...]
) -> None:
    x, direction, positions, documents = inputs
    wanted = results(filled(layer), x, direction, tokens_of(positions, documents))
    layer.zero_grad()
    keep_own_heads(layer, part.rank % tensor, tensor)
    tokens = replace(tokens_of(positions, documents), part=part)
    found = results(layer, part.take(x), part.take(direction), tokens)
    for key, value in found.items():
        if key in {"output", "x"}:
            mine, theirs = value, part.take(wanted[key])
        else:
            pieces = torch.zeros(tensor, *value.shape, dtype=value.dtype)
            pieces[part.rank % tensor if key in CUT else 0] = value
            dist.all_reduce(pieces)
            mine = torch.cat(list(pieces), dim=CUT[key]) if key in CUT else pieces[0]
            theirs = wanted[key]
        error = (mine - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < 1e-11, (name, key, error)


def check_layers(rank: int, context: int, tensor: int, kind: ContextSplit) -> None:
    layout = ParallelLayout(context=context, tensor=tensor)
    part = sequence_split(build_mesh(layout, "cpu"), kind).of(LENGTH)
    inputs = batch()
    for name, layer in layers():
        # With few entries the selection is never gathered; both forms are to be seen.
        compressed.SHARE_TO_GATHER = 0 if "csa sparse 2" in name else 8
        check_layer(name, layer, part, tensor, inputs)


@pytest.mark.parametrize(
    ("context", "tensor", "kind"),
    [
        (2, 1, "contiguous"),
        pytest.param(2, 2, "zigzag", marks=pytest.mark.slow),
        pytest.param(1, 2, "zigzag", marks=pytest.mark.slow),
        pytest.param(4, 1, "zigzag", marks=pytest.mark.slow),
        pytest.param(2, 2, "contiguous", marks=pytest.mark.slow),
        pytest.param(4, 2, "zigzag", marks=pytest.mark.slow),
        pytest.param(2, 4, "zigzag", marks=pytest.mark.slow),
    ],
)
def test_spread_attention_is_that_of_one_rank(
    context: int, tensor: int, kind: ContextSplit
) -> None:
    run_distributed(check_layers, context * tensor, context, tensor, kind, timeout=300.0)
