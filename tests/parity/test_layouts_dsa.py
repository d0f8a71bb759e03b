"""Sparse attention trained through its stages, on one rank and sharded: the same numbers in fp64."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import Batch, build_loader
from parallel.backend.cpu import CpuBackend
from tests.checkpoints import save
from tests.harness import run_distributed
from tests.parity.test_layouts import recipe, whole
from train.build import build
from train.checkpoint.state import Progress, restore
from train.config import RunConfig
from train.model.attention.config import IndexerConfig, IndexerStage, MlaConfig, YarnConfig
from train.step import train_step
from train.training import Training

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


def batches_of(training: Training) -> Iterator[tuple[Batch, dict[str, str]]]:
    return build_loader(
        training.config.data,
        split="train",
        seed=0,
        global_batch_size=8,
        data_rank=training.data_rank,
        data_size=training.data_size,
    )


def train_rank(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    batches = batches_of(training)
    found = []
    for step, stage in enumerate(STAGES, start=1):
        training.model.set_indexer_stage(stage)
        record: dict[str, Any] = dict(train_step(training, next(batches)[0], step))
        record["parameters"] = {
            name: whole(value) for name, value in training.model.named_parameters()
        }
        biases = [moe.expert_bias for moe in training.model.moe_layers()]
        record["bias"] = [bias.numpy().copy() for bias in biases if bias is not None]
        found.append(record)
    return found if rank == 0 else []


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    pairs = before["parameters"].items()
    return {name for name, value in pairs if not np.array_equal(value, after["parameters"][name])}


@pytest.fixture(scope="module")
def reference(tiny_corpus: Path) -> list[dict[str, Any]]:
    """On one rank in fp64, a whole batch at a time."""
    steps: list[dict[str, Any]]
    [steps] = run_distributed(train_rank, 1, sparse_recipe(tiny_corpus, 1, 1, 8))
    return steps


@pytest.mark.slow
def test_every_stage_trains_alike_on_sharded_ranks(
    tiny_corpus: Path, reference: list[dict[str, Any]]
) -> None:
    found = run_distributed(train_rank, 2, sparse_recipe(tiny_corpus, 2, 2, 2))
    for stage, ours, theirs in zip(STAGES, found[0], reference, strict=True):
        learning = INDEXING if stage != "dense" else ()
        for name in (*LOSSES, *learning):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-11), (stage, name)
        assert ("dsa/indexer_kl" in ours) == (stage != "dense")
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (stage, name, error)


@pytest.mark.slow
def test_bf16_on_sharded_ranks_stays_close(
    tiny_corpus: Path, reference: list[dict[str, Any]]
) -> None:
    """The fp32 modules of an indexer are gathered apart, also in a stage that calls none of them."""
    found = run_distributed(train_rank, 2, sparse_recipe(tiny_corpus, 2, 1, 2, "bf16"))
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=0.02), name
        if "dsa/indexer_kl" in theirs:
            assert ours["dsa/indexer_kl"] == pytest.approx(theirs["dsa/indexer_kl"], rel=0.05)


def test_stages_move_what_they_should(reference: list[dict[str, Any]]) -> None:
    names = set(reference[0]["parameters"])
    indexers = {name for name in names if ".indexer." in name}
    assert moved(reference[0], reference[1]) == indexers
    assert moved(reference[1], reference[2]) == indexers
    # The convolution was still 0, so the norm before it had no gradient, and norms do not decay.
    assert moved(reference[2], reference[3]) == names - {"layers.1.engram.conv_norm"}
    for frozen in (1, 2):
        for before, after in zip(reference[0]["bias"], reference[frozen]["bias"], strict=True):
            assert np.array_equal(before, after)


def test_what_is_logged_adds_up(reference: list[dict[str, Any]]) -> None:
    layers = 3  # two blocks and that of MTP
    for step in reference[1:]:
        assert step["loss_indexer"] == pytest.approx(0.7 * layers * step["dsa/indexer_kl"])
        total = step["loss_main"] + 0.3 * step["loss_mtp"] + step["loss_balance"]
        assert step["loss"] == pytest.approx(total + step["loss_indexer"])
        assert 0 < step["dsa/topk_recall"] < 1
        assert 0 < step["dsa/topk_mass"] < 1


def save_in_warm_up(rank: int, config: RunConfig, run_dir: Path) -> dict[str, Any]:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    training.model.set_indexer_stage("dense_warmup")
    batch = next(batches_of(training))[0]
    train_step(training, batch, 1)
    progress = Progress(step=1, tokens=0, data_state={f"lane/{rank}": "{}"})
    save(training, run_dir, progress)
    return {name: whole(value) for name, value in training.model.named_parameters()}


def resume_sparse(rank: int, config: RunConfig, run_dir: Path) -> dict[str, Any]:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    restore(
        run_dir,
        training.model,
        training.engine,
        [f"lane/{rank}"],
        rng_state=training.backend.rng_state(),
        tables=training.tables,
        corpus="",
    )
    loaded = {name: whole(value) for name, value in training.model.named_parameters()}
    record = train_step(training, next(batches_of(training))[0], 2)
    assert record["loss"] > 0
    return loaded


def test_a_checkpoint_of_the_warm_up_goes_on_in_the_sparse_stage(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    warm_up = sparse_recipe(tiny_corpus, 1, 1, 8)
    [saved] = run_distributed(save_in_warm_up, 1, warm_up, tmp_path)
    indexer = replace(warm_up.model.indexer, stage="sparse")
    sparse = replace(warm_up, model=replace(warm_up.model, indexer=indexer))
    [loaded] = run_distributed(resume_sparse, 1, sparse, tmp_path)
    assert saved.keys() == loaded.keys()
    assert all(np.array_equal(value, loaded[name]) for name, value in saved.items())
