"""Sparse attention trained through its stages, on one rank and sharded: the same numbers in fp64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from tests.harness import run_distributed
from tests.parity.test_layouts import recipe, whole
from train.build import build
from train.config import RunConfig
from train.model.attention.config import IndexerConfig, IndexerStage, MlaConfig, YarnConfig
from train.step import train_step

STAGES: tuple[IndexerStage, ...] = ("dense", "dense_warmup", "dense_warmup", "sparse", "sparse")
LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")
INDEXING = ("loss_indexer", "dsa/indexer_kl", "dsa/topk_recall", "dsa/topk_mass")


def sparse_recipe(
    corpus: Path, data: int, expert: int, micro: int, dtype: str = "fp64"
) -> RunConfig:
    config = recipe(corpus, "mhc", data, expert, micro)
    model = replace(
        config.model,
        attention="dsa",
        mla=MlaConfig(yarn=YarnConfig(factor=4.0, original_max_position_embeddings=16)),
        indexer=IndexerConfig(num_heads=8, head_dim=16, top_k=2, stage=STAGES[0], loss_weight=0.7),
    )
    train = replace(config.train, dtype=dtype, steps=len(STAGES))  # type: ignore[arg-type]
    return replace(config, model=model, train=train)


def train_rank(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    batches = build_loader(
        config.data,
        split="train",
        seed=0,
        global_batch_size=8,
        data_rank=training.data_rank,
        data_size=config.parallel.data_parallel_size,
    )
    found = []
    for step, stage in enumerate(STAGES, start=1):
        training.model.set_indexer_stage(stage)
        record: dict[str, Any] = dict(train_step(training, next(batches)[0], step))
        record["parameters"] = {
            name: whole(value) for name, value in training.model.named_parameters()
        }
        record["bias"] = [moe.expert_bias.numpy().copy() for moe in training.model.moe_layers()]
        found.append(record)
    return found if rank == 0 else []


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    pairs = before["parameters"].items()
    return {name for name, value in pairs if not np.array_equal(value, after["parameters"][name])}


@pytest.mark.parametrize(("data", "expert", "micro"), [(2, 2, 1), (2, 1, 2)])
def test_every_stage_trains_alike_in_every_layout(
    tiny_corpus: Path, data: int, expert: int, micro: int
) -> None:
    [reference] = run_distributed(train_rank, 1, sparse_recipe(tiny_corpus, 1, 1, 8))
    found = run_distributed(train_rank, data, sparse_recipe(tiny_corpus, data, expert, micro))
    for stage, ours, theirs in zip(STAGES, found[0], reference, strict=True):
        learning = INDEXING if stage != "dense" else ()
        for name in (*LOSSES, *learning):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-11), (stage, name)
        assert ("dsa/indexer_kl" in ours) == (stage != "dense")
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (stage, name, error)


def test_stages_move_what_they_should(tiny_corpus: Path) -> None:
    [steps] = run_distributed(train_rank, 1, sparse_recipe(tiny_corpus, 1, 1, 8))
    names = set(steps[0]["parameters"])
    indexers = {name for name in names if ".indexer." in name}
    assert moved(steps[0], steps[1]) == moved(steps[1], steps[2]) == indexers
    assert moved(steps[2], steps[3]) == names
    for frozen in (1, 2):
        for before, after in zip(steps[0]["bias"], steps[frozen]["bias"], strict=True):
            assert np.array_equal(before, after)
    first, later = steps[1], steps[2]
    layers = 3  # two blocks and that of MTP
    assert first["loss_indexer"] == pytest.approx(0.7 * layers * first["dsa/indexer_kl"])
    total = later["loss_main"] + 0.3 * later["loss_mtp"] + later["loss_balance"]
    assert later["loss"] == pytest.approx(total + later["loss_indexer"])
    assert 0 < later["dsa/topk_recall"] < 1
    assert 0 < later["dsa/topk_mass"] < 1
    assert set(steps[0]["parameters"]) == set(steps[4]["parameters"])
