from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, packed, relative_error
from train.model.attention import compressed
from train.model.attention.blocks import Blocks
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import CompressedConfig, IndexerConfig

CONFIG = replace(
    TINY,
    attention="v4_hybrid",
    num_attention_heads=2,
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 8),
        hca_ratio=8,
        sliding_window=6,
        q_lora_rank=16,
        head_dim=8,
        rope_head_dim=4,
        output_lora_rank=12,
    ),
    # Many heads: a score of 0, where all rectify, is a tie.
    indexer=IndexerConfig(num_heads=16, head_dim=8, top_k=3),
)
SPARSE = 1
"""Layer of CSA."""


def attention(layer: int, **indexer: Any) -> HybridAttention:
    torch.manual_seed(0)
    module = HybridAttention(replace(CONFIG, indexer=replace(CONFIG.indexer, **indexer)), layer)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def batch(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    _, positions, documents = packed(lengths)
    return torch.randn(2, sum(lengths), CONFIG.hidden_size), positions, documents


def test_layers_differ_by_their_ratio() -> None:
    window, csa, hca = (attention(layer) for layer in range(3))
    assert window.compressor is None
    assert window.indexer is None
    assert window.theta == 10000.0
    assert csa.compressor is not None
    assert csa.indexer is not None
    assert csa.theta == 160000.0
    assert hca.compressor is not None
    assert hca.indexer is None
    assert csa.compressor.kv.out_features == 16
    assert hca.compressor.kv.out_features == 8


def test_selecting_every_entry_is_attention_to_all_bitwise() -> None:
    x, *places = batch(30, 10, 9)
    tokens = tokens_of(*places)
    dense = attention(SPARSE, stage="dense")(x, tokens)
    assert torch.equal(attention(SPARSE, top_k=12)(x, tokens), dense)
    masked = attention(SPARSE, top_k=11)
    torch.testing.assert_close(masked(x, tokens), dense, rtol=1e-5, atol=1e-6)
    assert relative_error(attention(SPARSE, top_k=2)(x, tokens), dense) > 1e-3


def test_gathered_and_masked_selections_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, positions, documents = batch(30, 10, 9)
    results = []
    for share in (8, 0):
        monkeypatch.setattr(compressed, "SHARE_TO_GATHER", share)
        module, leaf = attention(SPARSE), x.clone().requires_grad_()
        out = module(leaf, tokens_of(positions, documents))
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, module.sink.logits])])
    for masked, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)


def teachers(
    module: HybridAttention, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head-summed attention on the entries by the joint softmax, and by one over entries alone;
    the index scores; which entries no query may attend to. All as whole matrices."""
    x, positions, documents = inputs
    assert module.indexer is not None
    tokens = tokens_of(positions, documents)
    tables = module.tables(positions)
    blocks = Blocks.of(positions, documents, 4)
    latent = module.q_a_norm(module.q_a(x))
    parts = module.parts(x, latent, tokens, blocks, tables)
    seq, count = x.shape[1], parts.entries.shape[1]
    place = torch.arange(seq)
    distance = place[:, None] - place
    same = documents[:, :, None] == documents[:, None]
    window = same & (distance >= 0) & (distance < module.window)
    hidden = blocks.visibility(documents).hidden(0, seq, count)

    query, key, weights = module.index(x, latent, tokens, blocks, tables, idle=False)
    scores = torch.einsum("bqhd,bkd->bqhk", query, key).relu()
    scores = torch.einsum("bqhk,bqh->bqk", scores, weights).masked_fill(hidden, float("-inf"))
    if module.indexer.stage == "sparse":
        best = scores.topk(module.indexer.top_k)
        hidden = torch.ones_like(hidden).scatter(2, best.indices, False) | hidden
        scores = scores.masked_fill(hidden, float("-inf"))

    keys = torch.cat([parts.kv, parts.entries], dim=1)
    logits = torch.einsum("bqhd,bkd->bqhk", parts.query, keys)
    unseen = torch.cat([~window, hidden], dim=-1).unsqueeze(2)
    logits = logits.masked_fill(unseen, float("-inf"))
    sink = parts.sink.view(1, 1, -1, 1).expand(*logits.shape[:3], 1)
    joint = torch.cat([logits, sink], dim=-1).softmax(-1)[..., seq:-1].sum(2)
    alone = logits[..., seq:].softmax(-1).nan_to_num(0.0).sum(2)
    return joint.detach(), alone.detach(), scores, hidden


def divergence(target: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
    some = ~hidden.all(-1, keepdim=True)
    log = torch.log_softmax(scores.masked_fill(~some, 0.0), dim=-1).masked_fill(hidden, 0.0)
    return (torch.xlogy(target, target) - target * log).sum()


@pytest.mark.parametrize(("stage", "gather"), [("dense_warmup", 8), ("sparse", 8), ("sparse", 0)])
def test_the_indexer_learns_from_the_joint_softmax(
    stage: str, gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads, and queries that see two entries and more: fewer of either cannot tell."""
    monkeypatch.setattr(compressed, "SHARE_TO_GATHER", gather)
    module = attention(SPARSE, stage=stage).double()
    x, positions, documents = batch(30, 10, 9)
    inputs = (x.double(), positions, documents)
    assert module.indexer is not None
    module.indexer.loss_scale = 0.25
    module(inputs[0], tokens_of(*inputs[1:])).sum().backward()
    found = module.indexer.take_sums()[0]
    gradients = {name: p.grad for name, p in module.indexer.named_parameters()}

    joint, alone, scores, hidden = teachers(module, inputs)
    right, wrong = divergence(joint, scores, hidden), divergence(alone, scores, hidden)
    torch.testing.assert_close(found, right.detach())
    assert abs(wrong - right) > 0.01 * right
    names, parameters = zip(*module.indexer.named_parameters(), strict=True)
    wanted = torch.autograd.grad(0.25 * right, parameters, retain_graph=True)
    others = torch.autograd.grad(0.25 * wrong, parameters)
    for name, grad, other in zip(names, wanted, others, strict=True):
        torch.testing.assert_close(gradients[name], grad, rtol=1e-6, atol=1e-9)
        assert relative_error(other, grad) > 0.01


def test_the_indexer_learns_nothing_else_and_teaches_nobody() -> None:
    inputs = batch(30, 10)
    silent, speaking = attention(SPARSE), attention(SPARSE)
    assert silent.indexer is not None
    assert speaking.indexer is not None
    speaking.indexer.loss_scale = 1.0
    for module in (silent, speaking):
        module(inputs[0], tokens_of(*inputs[1:])).square().sum().backward()
    for (name, mine), other in zip(speaking.named_parameters(), silent.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        if name.startswith("indexer."):
            assert mine.grad.any(), name
            assert not other.grad.any(), name
        else:
            assert torch.equal(mine.grad, other.grad), name


@pytest.mark.parametrize("layer", range(3))
def test_short_documents_have_only_the_window(layer: int) -> None:
    module = attention(layer)
    if module.indexer is not None:
        module.indexer.loss_scale = 1.0
    # No document has a block, but the sequence is long enough for some.
    x, *places = batch(3, 3, 2, 1, 3)
    out = module(x, tokens_of(*places))
    out.sum().backward()
    assert out.isfinite().all()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    if module.indexer is not None:
        assert module.indexer.take_sums().tolist() == [0.0] * 4


def test_recall_counts_queries_that_see_more_entries_than_they_select() -> None:
    module = attention(SPARSE)
    assert module.indexer is not None
    inputs = batch(16)
    module(inputs[0], tokens_of(*inputs[1:])).sum().backward()
    sums = module.indexer.take_sums()
    # Only the last query sees 4 entries; two sequences.
    assert sums[3] == 2
    joint, *_ = teachers(attention(SPARSE, stage="dense_warmup"), inputs)
    chosen = ~teachers(attention(SPARSE), inputs)[3][:, -1]
    attended = joint[:, -1]
    best = attended.topk(3).indices
    torch.testing.assert_close(sums[1], chosen.gather(1, best).sum() / 3)
    torch.testing.assert_close(sums[2], ((attended * chosen).sum(-1) / attended.sum(-1)).sum())


@pytest.mark.parametrize("layer", range(3))
def test_bf16_stays_close_to_fp32(layer: int) -> None:
    module = attention(layer, stage="dense")
    inputs = batch(40, 23)
    wanted = module(inputs[0], tokens_of(*inputs[1:]))
    kept = set(module.fp32_modules())
    if module.indexer is not None:
        kept |= set(module.indexer.fp32_modules())
    for part in module.modules():
        if part not in kept:
            for name, parameter in part.named_parameters(recurse=False):
                part.register_parameter(name, nn.Parameter(parameter.bfloat16()))
    found = module(inputs[0].bfloat16(), tokens_of(*inputs[1:]))
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted) < 0.03
    assert F.mse_loss(found.float(), wanted) > 0
