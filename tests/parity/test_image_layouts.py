"""Pictures on some ranks and in some microbatches only: the numbers of one rank that has them all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

from data.config import DataConfig, SourceConfig
from data.packing import Batch
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from tests.harness import run_distributed
from tests.unit.train.model.images import VISION, Document, crop, pack_documents
from train.build import build
from train.config import OptimConfig, RunConfig, TrainConfig
from train.model.config import EngramConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step
from train.training import Training

SEES = replace(VISION, placeholder_token_id=511, rope_sections=(2, 3, 3))


def recipe(corpus: Path, ranks: int, micro: int) -> RunConfig:
    return RunConfig(
        name="images",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=2,
            intermediate_size=64,
            moe=MoeConfig(num_experts=4, expert_intermediate_size=16, balance_loss_weight=0.01),
            engram=EngramConfig(rows_per_head=50, head_dim=8),
            mtp_depth=1,
            vision=SEES,
        ),
        parallel=ParallelConfig(data_parallel_size=ranks, expert_parallel_size=ranks),
        data=DataConfig(
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("code", "docs")},
            tokenizer=str(corpus / "tokenizer.json"),
            sequence_length=20,
        ),
        optim=OptimConfig(warmup_steps=0, eps=1e-8),
        train=TrainConfig(steps=2, global_batch_size=4, micro_batch_size=micro, dtype="fp64"),
    )


def global_batch(step: int) -> Batch:
    """Only the second of four sequences has pictures: rank 1 has none, nor has microbatch 0."""
    text = [int(t) for t in np.random.default_rng(step).integers(3, 500, 60)]
    seeing: list[Document] = [
        [9, crop(40 * step, 90, 16, 24), *text[:3]],
        [crop(200, 50 * step, 16, 16), *text[3:9]],
    ]
    return pack_documents([[text[:20]], seeing, [text[20:40]], [text[40:]]], SEES)


def join(config: RunConfig) -> Training:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return build(config)


def own_part(training: Training, step: int) -> Batch:
    train, parallel = training.config.train, training.config.parallel
    size = train.global_batch_size // parallel.data_parallel_size
    rows = slice(training.data_rank * size, (training.data_rank + 1) * size)
    batch = global_batch(step)
    assert batch.vision is not None
    seen = batch.vision.select(rows)
    return Batch(
        input_ids=batch.input_ids[rows],
        labels=batch.labels[rows],
        position_ids=batch.position_ids[rows],
        document_ids=batch.document_ids[rows],
        # As a loader without any picture at hand would leave it.
        vision=seen if len(seen.grids) else None,
    )


def train_rank(rank: int, config: RunConfig) -> list[dict[str, Any]]:
    training = join(config)
    found = []
    for step in (1, 2):
        record: dict[str, Any] = dict(train_step(training, own_part(training, step), step))
        record["parameters"] = {
            name: value.full_tensor().detach().numpy().copy()
            for name, value in training.model.named_parameters()
            if isinstance(value, DTensor)
        }
        found.append(record)
    return found if rank == 0 else []


CUT = ParallelConfig(tensor_parallel_size=2, expert_parallel_size=2)


@pytest.mark.parametrize(
    ("micro", "parallel"),
    [
        (2, CUT),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(2, None, marks=pytest.mark.slow),
    ],
)
def test_ranks_without_pictures_train_along(
    tiny_corpus: Path, micro: int, parallel: ParallelConfig | None
) -> None:
    """Without tokens of pictures where the sequences are cut."""
    [reference] = run_distributed(train_rank, 1, recipe(tiny_corpus, 1, 4))
    config = recipe(tiny_corpus, 2, micro)
    found = run_distributed(train_rank, 2, replace(config, parallel=parallel or config.parallel))
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)
    start, end = reference[0]["parameters"], reference[1]["parameters"]
    moved = [n for n in start if n.startswith("vision.") and (start[n] != end[n]).any()]
    assert len(moved) == len([n for n in start if n.startswith("vision.")])


def refused_by(rank: int, config: RunConfig) -> str:
    training = join(config)
    part = own_part(training, 1)
    with pytest.raises(ValueError, match="placeholders") as caught:
        train_step(training, replace(part, vision=None), 1)
    return str(caught.value)


def test_missing_pictures_of_one_rank_are_refused_by_all(tiny_corpus: Path) -> None:
    said = run_distributed(refused_by, 2, recipe(tiny_corpus, 2, 2))
    assert said[0] == said[1]
    assert said[0].startswith("rank 0: model.vision.placeholder_token_id=511: the sequences hold")
