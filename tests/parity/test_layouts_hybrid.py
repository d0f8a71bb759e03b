"""V4's hybrid attention trained through the indexer's stages, on one rank and sharded, in fp64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import run_distributed
from tests.parity.test_layouts import recipe
from tests.parity.test_layouts_dsa import INDEXING, LOSSES, STAGES, train_rank
from train.config import RunConfig
from train.model.attention.config import CompressedConfig, IndexerConfig, YarnConfig

HYBRID = CompressedConfig(
    # Window, CSA and HCA; CSA in the MTP block.
    compress_ratios=(0, 4, 16, 4),
    sliding_window=8,
    q_lora_rank=24,
    head_dim=16,
    rope_head_dim=8,
    output_lora_rank=16,
    yarn=YarnConfig(factor=4.0, original_max_position_embeddings=16),
)
INDEXER = IndexerConfig(num_heads=8, head_dim=16, top_k=2, stage=STAGES[0], loss_weight=0.7)


def hybrid_recipe(corpus: Path, data: int, micro: int, dtype: str = "fp64") -> RunConfig:
    config = recipe(corpus, "mhc", data, 1, micro)
    model = replace(
        config.model, num_layers=3, attention="v4_hybrid", compressed=HYBRID, indexer=INDEXER
    )
    train = replace(config.train, dtype=dtype, steps=len(STAGES))  # type: ignore[arg-type]
    return replace(config, model=model, train=train)


@pytest.fixture(scope="module")
def reference(tiny_corpus: Path) -> list[dict[str, Any]]:
    """On one rank in fp64, a whole batch at a time."""
    steps: list[dict[str, Any]]
    [steps] = run_distributed(train_rank, 1, hybrid_recipe(tiny_corpus, 1, 8))
    return steps


def test_every_stage_trains_alike_on_sharded_ranks(
    tiny_corpus: Path, reference: list[dict[str, Any]]
) -> None:
    found = run_distributed(train_rank, 2, hybrid_recipe(tiny_corpus, 2, 2))
    for stage, ours, theirs in zip(STAGES, found[0], reference, strict=True):
        for name in (*LOSSES, *(INDEXING if stage != "dense" else ())):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-11), (stage, name)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (stage, name, error)


@pytest.mark.slow
def test_bf16_on_sharded_ranks_stays_close(
    tiny_corpus: Path, reference: list[dict[str, Any]]
) -> None:
    """Sink and pooling are gathered in fp32, apart from the rest."""
    found = run_distributed(train_rank, 2, hybrid_recipe(tiny_corpus, 2, 2, "bf16"))
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=0.02), name
        if "dsa/indexer_kl" in theirs:
            assert ours["dsa/indexer_kl"] == pytest.approx(theirs["dsa/indexer_kl"], rel=0.05)
