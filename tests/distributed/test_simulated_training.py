"""The whole training on the simulated HCCL: what it computes is what the host computes.

With two ranks bit by bit, given the host may not use fp64 either; with more, gloo's own
reduce-scatter, which stands for HCCL's, adds in another order.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose
from launch.validate import world_size
from parallel.backend.cpu import CpuBackend
from parallel.config import BackendName
from tests.distributed.backend_ranks import leave_harness, run_on
from train.config import RunConfig
from train.loop import train
from train.stop import StopRequest

SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "model.intermediate_size=64"),
    *("model.vocab_size=512", "model.moe.expert_intermediate_size=16", "data.sequence_length=64"),
    *("train.steps=3", "train.global_batch_size=8", "train.micro_batch_size=2"),
    "optim.warmup_steps=0",
    *("checkpoint.every_steps=3", "evaluate.every_steps=3", "evaluate.num_sequences=8"),
)
LAYOUTS: dict[str, tuple[tuple[str, ...], *tuple[str, ...]]] = {
    "ep2": (("data=2", "expert=2"),),
    "tp2": (("data=1", "tensor=2", "expert=2"),),
    "pp2": (("data=1", "pipeline=2", "expert=1"),),
    "cp2": (("data=1", "context=2", "expert=2"),),
    "dpr2": (("data=1", "data_replicate=2", "expert=2"),),
    "muon": (("data=2", "expert=2"), "optim.optimizer=muon"),
    "dp2,tp2": (("data=2", "tensor=2", "expert=4"),),
}
"""The sizes of axes, and other overrides."""


def v4_nano(corpus: Path, axes: tuple[str, ...], *more: str) -> RunConfig:
    """The recipe, smaller: mixture of experts, mHC, Engram's tables in host memory, MTP."""
    paths = [f"data.tokenizer={corpus}/tokenizer.json"]
    paths += [f"data.sources.{name}.path={corpus}/{name}" for name in ("code", "docs")]
    sizes = [f"parallel.{axis.replace('=', '_parallel_size=')}" for axis in axes]
    return compose("v4_nano", [*SMALL, *paths, *sizes, *more]).config


def train_on(rank: int, port: int, config: RunConfig, run_dir: Path, fp64: bool) -> None:
    leave_harness(port)
    os.environ["WANDB_MODE"] = "disabled"
    CpuBackend.capabilities = replace(CpuBackend.capabilities, fp64=fp64)
    assert train(config, run_dir, StopRequest()) == 0


def rows(
    config: RunConfig, run_dir: Path, backend: BackendName, fp64: bool
) -> list[dict[str, Any]]:
    """What a run wrote down, without times and memory."""
    run_dir.mkdir()
    config = replace(config, parallel=replace(config.parallel, backend=backend))
    run_on(train_on, world_size(config), config, run_dir, fp64, timeout=100.0)
    assert (run_dir / "checkpoints/step-00000003").is_dir()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    varying = ("second", "memory", "fraction", "fetch", "utilization")
    return [
        {k: v for k, v in json.loads(line).items() if not any(word in k for word in varying)}
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_v4_nano_trains_as_on_the_host(tiny_corpus: Path, tmp_path: Path, layout: str) -> None:
    axes, *more = LAYOUTS[layout]
    config = v4_nano(tiny_corpus, axes, *more)
    simulated = rows(config, tmp_path / "simulated", "simulated", fp64=False)
    host = rows(config, tmp_path / "host", "cpu", fp64=False)
    assert [row["step"] for row in simulated] == [1, 2, 3]
    assert simulated[0]["loss_mtp"] > 0
    assert "validation/loss" in simulated[2]
    if world_size(config) == 2:
        assert simulated == host
    else:
        assert_close(simulated, host)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_differs_from_the_host_with_fp64_is_rounding(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    config = v4_nano(tiny_corpus, *LAYOUTS["ep2"])
    simulated = rows(config, tmp_path / "simulated", "simulated", fp64=False)
    host = rows(config, tmp_path / "host", "cpu", fp64=True)
    assert simulated != host
    assert_close(simulated, host)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Losses and the gradient norm, to the rounding of fp32 sums."""
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
