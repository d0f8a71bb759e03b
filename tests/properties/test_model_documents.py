"""A document in a packed sequence is computed as if it were alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import FULL, MEMORY, build, packed, with_changes
from train.model.attention.config import CompressedConfig, IndexerConfig
from train.model.attention.dsa import SparseLatentAttention
from train.model.config import HyperConnectionConfig
from train.model.transformer import Transformer, TransformerOutput

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
SPARSE = IndexerConfig(num_heads=16, head_dim=6, top_k=3)
CONFIGS = {kind: with_changes(FULL, residual=kind) for kind in ("plain", "hc", "mhc")}
CONFIGS["dsa"] = with_changes(FULL, attention="dsa", indexer=SPARSE)
CONFIGS["v4.1"] = with_changes(
    FULL,
    residual="mhc_single_pass",
    hyper_connection=HyperConnectionConfig(read_out="gated"),
    mtp_kind="v4",
    engram=replace(MEMORY, ngram_orders=(2, 3, 4), conv_kernel_size=0),
)
HYBRID = CompressedConfig(
    compress_ratios=(0, 2, 4, 2), csa_ratio=2, hca_ratio=4, sliding_window=3, rope_head_dim=6
)
CONFIGS["v4_hybrid"] = with_changes(
    FULL, attention="v4_hybrid", compressed=HYBRID, indexer=replace(SPARSE, top_k=2)
)
MODELS = {kind: build(config, noise=0.1) for kind, config in CONFIGS.items()}


def everything(output: TransformerOutput) -> Tensor:
    return torch.cat([output.logits, *output.mtp_logits], dim=-1)


def run(model: Transformer, batch: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return everything(model(*batch))


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_packed_equals_separate(kind: str, lengths: list[int], seed: int) -> None:
    model = MODELS[kind]
    batch = packed(tuple(lengths), batch=1, seed=seed)
    together = run(model, batch)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for length, end in zip(lengths, ends, strict=True):
        alone = [part[:, end - length : end] for part in batch]
        torch.testing.assert_close(
            run(model, alone), together[:, end - length : end], rtol=1e-4, atol=1e-5
        )


@settings(max_examples=12, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), data=st.data())
def test_a_changed_token_moves_only_the_rest_of_its_document(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    ids, positions, documents = packed(tuple(lengths), batch=1, seed=seed)
    place = data.draw(st.integers(0, ids.shape[1] - 1))
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 1) % 64
    before = run(MODELS["mhc"], [ids, positions, documents])
    after = run(MODELS["mhc"], [changed, positions, documents])
    # Not bitwise: a changed token may be routed elsewhere, and matrix products over other numbers
    # of rows round differently.
    moved = (before - after).abs().view(-1, 2, 64).amax(-1) > 1e-4
    same = documents[0] == documents[0, place]
    places = torch.arange(ids.shape[1])
    assert not moved[~(same & (places >= place)), 0].any()
    # MTP at place - 1 is told the changed token.
    assert not moved[~(same & (places >= place - 1)), 1].any()
    assert moved[place].all()


@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_an_indexer_learns_from_each_document_as_if_it_were_alone(
    lengths: list[int], seed: int
) -> None:
    layer = MODELS["dsa"].layers["0"].attention
    assert isinstance(layer, SparseLatentAttention)
    layer.indexer.loss_scale = 1.0
    _, positions, documents = packed(tuple(lengths), batch=1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*positions.shape, 32, generator=generator)

    def learn(part: slice) -> list[Tensor]:
        layer.zero_grad()
        layer(x[:, part], tokens_of(positions[:, part], documents[:, part])).sum().backward()
        grads = [p.grad for p in layer.indexer.parameters() if p.grad is not None]
        return [layer.indexer.take_sums()[0], *grads]

    together = learn(slice(None))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    alone = [learn(slice(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        wanted = torch.stack(parts).sum(0)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
