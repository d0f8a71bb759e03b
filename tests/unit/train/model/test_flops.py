"""The arithmetic of `train.model.flops` against torch's counter of what really runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.grouped import loop
from tests.unit.train.model.tiny import FULL, TINY, build, packed
from train.model.attention import core, indexer, windowed
from train.model.attention.config import CompressedConfig, IndexerConfig
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.flops import (
    forward_flops,
    indexer_flops,
    mean_seen,
    training_flops,
    vision_flops,
)
from train.model.multimodal.config import VisionConfig, VisionEncoderConfig
from train.model.multimodal.tower import VisionTower

LENGTH, BATCH = 48, 2
DSA = replace(TINY, attention="dsa", indexer=IndexerConfig(num_heads=2, head_dim=8, top_k=12))
HYBRID = replace(
    TINY,
    attention="v4_hybrid",
    indexer=IndexerConfig(num_heads=2, head_dim=8, top_k=5),
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 16),
        sliding_window=10,
        q_lora_rank=24,
        head_dim=16,
        rope_head_dim=4,
        output_groups=2,
        output_lora_rank=8,
    ),
)


@pytest.fixture
def exact_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute one query at a time, so that no score is computed only to be hidden."""
    monkeypatch.setattr(core, "CHUNK_BYTES", 4)
    monkeypatch.setattr(indexer, "CHUNK", 1)
    for module in (indexer, windowed):
        monkeypatch.setattr(module, "chunk_size", lambda numbers: 1)


def counted(config: ModelConfig) -> float:
    """Operations of a token in a forward pass, as they run."""
    model = build(config).eval()
    for moe in model.moe_layers():
        moe.experts.grouped_linear = loop  # torch's counter does not know grouped_mm
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*packed((LENGTH,), batch=BATCH))
    return counter.get_total_flops() / (BATCH * LENGTH)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": "plain"},
        {"residual": "hc"},
        {"residual": "mhc_single_pass"},
        {"hyper_connection": HyperConnectionConfig(read_out="gated", num_streams=2)},
        {"num_dense_layers": 3},
        {"engram": FULL.engram},
        {"mtp_depth": 1},
        {"mtp_depth": 1, "mtp_kind": "v4"},
        {"mla": replace(TINY.mla, q_lora_rank=None)},
    ],
    ids=str,
)
def test_every_product_of_the_forward_pass_is_counted(
    changes: dict[str, Any], exact_masks: None
) -> None:
    config = replace(TINY, **changes)
    assert forward_flops(config, LENGTH) == pytest.approx(counted(config), rel=1e-9)


def test_sparse_attention_counts_the_selected_keys(exact_masks: None) -> None:
    # Few of many keys would be gathered; here all are scored and those not selected are hidden.
    per_key = 2 * 2 * (8 + 4 + 8)
    hidden = mean_seen(LENGTH) - mean_seen(LENGTH, most=12)
    expected = forward_flops(DSA, LENGTH) + DSA.num_layers * per_key * hidden
    assert expected == pytest.approx(counted(DSA), rel=1e-9)


def test_hybrid_attention_counts_window_and_entries(exact_masks: None) -> None:
    per_key = 4 * HYBRID.num_attention_heads * 16
    unselected = mean_seen(LENGTH, stride=4) - mean_seen(LENGTH, stride=4, most=5)
    sinks = HYBRID.num_layers  # computed as one more key of each layer's queries
    expected = forward_flops(HYBRID, LENGTH) + per_key * (unselected + sinks)
    assert expected == pytest.approx(counted(HYBRID), rel=1e-9)


def test_an_idle_indexer_costs_nothing(exact_masks: None) -> None:
    dense = replace(DSA, indexer=replace(DSA.indexer, stage="dense"))
    assert forward_flops(dense, LENGTH) == pytest.approx(counted(dense), rel=1e-9)
    assert indexer_flops(dense, LENGTH) == 0
    assert indexer_flops(TINY, LENGTH) == 0


@pytest.mark.parametrize(("length", "stride", "most"), [(48, 1, None), (48, 4, 5), (47, 4, 50)])
def test_the_mean_of_seen_keys_is_that_of_all_queries(
    length: int, stride: int, most: int | None
) -> None:
    seen = [min(t // stride, most or length) for t in range(1, length + 1)]
    assert mean_seen(length, stride=stride, most=most) == pytest.approx(sum(seen) / length)


def test_a_backward_pass_is_two_forward_passes() -> None:
    # Of a plain model the counter sees both; attention and mHC have backward passes of their own.
    config = replace(TINY, residual="plain", num_dense_layers=3)
    model = build(config)
    counter = FlopCounterMode(display=False)
    with counter:
        model(*packed((LENGTH,), batch=BATCH)).logits.sum().backward()
    measured = counter.get_total_flops() / (BATCH * LENGTH)
    # Attention computes whole chunks, hidden scores included, and the embedding has no product.
    assert training_flops(config, LENGTH) == pytest.approx(measured, rel=0.1)


def test_a_frozen_model_only_runs_forward() -> None:
    warmup = replace(DSA, indexer=replace(DSA.indexer, stage="dense_warmup"))
    forward, indexers = forward_flops(warmup, LENGTH), indexer_flops(warmup, LENGTH)
    assert training_flops(warmup, LENGTH, frozen=True) == forward + 2 * indexers


@pytest.mark.parametrize("encoder", [None, VisionEncoderConfig(num_layers=2, hidden_size=16)])
@pytest.mark.parametrize("between", [None, 20])
def test_the_tower_costs_by_frames_and_patches(
    encoder: VisionEncoderConfig | None, between: int | None
) -> None:
    config = VisionConfig(patch_size=4, encoder=encoder, projector_intermediate_size=between)
    tower = VisionTower(config, 32, 1e-6)
    torch.nn.utils.vector_to_parameters(
        torch.full((sum(p.numel() for p in tower.parameters()),), 0.1), tower.parameters()
    )
    grids = [(1, 4, 6), (3, 2, 2)]
    patches = torch.zeros(sum(t * h * w for t, h, w in grids), 48, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    # nor the fused attention of the host
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        tower(patches, torch.tensor(grids))
    assert vision_flops(config, 32, grids) == 3 * counter.get_total_flops()
