"""The whole V4 stack, trained on one rank and on sharded layouts: the same numbers in fp64."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.config import DataConfig, SourceConfig
from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from tests.harness import run_distributed
from train.build import build
from train.config import MonitorConfig, OptimConfig, RunConfig, TrainConfig
from train.evaluate import evaluate
from train.model.config import EngramConfig, HyperConnectionConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step

STEPS = 3


ADAMW = OptimConfig(warmup_steps=0, eps=1e-8)
MUON = replace(ADAMW, optimizer="muon", table_optimizer="sinkhorn")


def recipe(
    corpus: Path, residual: str, data: int, expert: int, micro: int, optim: OptimConfig = ADAMW
) -> RunConfig:
    newer = residual == "mhc_single_pass"
    return RunConfig(
        name="layouts",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=2,
            intermediate_size=64,
            residual=residual,  # type: ignore[arg-type]
            hyper_connection=HyperConnectionConfig(read_out="gated" if newer else "mean"),
            moe=MoeConfig(num_experts=4, expert_intermediate_size=16, balance_loss_weight=0.01),
            engram=EngramConfig(rows_per_head=50, head_dim=8, conv_kernel_size=0 if newer else 4),
            mtp_depth=1,
            mtp_kind="v4" if newer else "v3",
        ),
        parallel=ParallelConfig(data_parallel_size=data, expert_parallel_size=expert),
        data=DataConfig(
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("code", "docs")},
            tokenizer=str(corpus / "tokenizer.json"),
            sequence_length=48,
        ),
        optim=optim,
        train=TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=micro, dtype="fp64"),
        monitor=MonitorConfig(residual_every_steps=1),
    )


def whole(value: Tensor) -> NDArray[np.float64]:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().numpy().copy()


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
        data_size=training.data_size,
    )
    found = []
    for step in range(1, STEPS + 1):
        record: dict[str, Any] = dict(train_step(training, next(batches)[0], step))
        if step == 2:
            record |= evaluate(training)
        record["parameters"] = {
            name: whole(value) for name, value in training.model.named_parameters()
        }
        biases = [moe.expert_bias for moe in training.model.moe_layers()]
        record["bias"] = [bias.numpy().copy() for bias in biases if bias is not None]
        found.append(record)
    return found if rank == 0 else []


@cache
def one_rank(corpus: Path, residual: str, optim: OptimConfig) -> list[dict[str, Any]]:
    [found] = run_distributed(train_rank, 1, recipe(corpus, residual, 1, 1, 8, optim))
    trace: list[dict[str, Any]] = found
    return trace


CASES = [
    ("mhc", 2, 2, 2, ADAMW),
    ("mhc", 2, 1, 2, MUON),
]
MORE = [
    ("mhc", 4, 2, 1, ADAMW),
    ("plain", 2, 2, 2, ADAMW),
    ("mhc", 4, 4, 2, ADAMW),
    ("hc", 4, 2, 1, ADAMW),
    ("plain", 4, 2, 1, ADAMW),
    ("mhc_single_pass", 4, 2, 1, ADAMW),
    ("mhc", 4, 2, 1, MUON),
]


@pytest.mark.parametrize(
    ("residual", "data", "expert", "micro", "optim"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_losses_norms_and_parameters_do_not_depend_on_the_layout(
    tiny_corpus: Path, residual: str, data: int, expert: int, micro: int, optim: OptimConfig
) -> None:
    assert "MNEME_BACKEND" not in os.environ
    reference = one_rank(tiny_corpus, residual, optim)
    layout = recipe(tiny_corpus, residual, data, expert, micro, optim)
    found = run_distributed(train_rank, data, layout)
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["moe/load_cv"] == theirs["moe/load_cv"]
        for mine, other in zip(ours["bias"], theirs["bias"], strict=True):
            assert np.array_equal(mine, other)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)
    assert found[0][1]["validation/loss"] == pytest.approx(reference[1]["validation/loss"])
