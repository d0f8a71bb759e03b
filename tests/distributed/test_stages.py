"""A run in stages with Muon and Sinkhorn tables: it learns, and goes on bitwise from any step."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data.config import DataConfig, SourceConfig
from parallel.backend.cpu import CpuBackend
from parallel.config import ParallelConfig
from tests.harness import run_distributed
from train.config import (
    BatchSizeRampConfig,
    CheckpointConfig,
    EvaluateConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from train.loop import train
from train.model.attention.config import IndexerConfig
from train.model.config import EngramConfig, ModelConfig
from train.model.moe.config import MoeConfig
from train.stop import StopRequest
from train.volume import step_volume

pytestmark = pytest.mark.slow

STEPS = 16
SEQUENCES = [4, 4, 4, *[8] * 7, *[4] * 6]
LENGTHS = [32] * 12 + [64] * 4


def recipe(corpus: Path, ranks: int) -> RunConfig:
    return RunConfig(
        name="stages",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=1,
            num_dense_layers=0,
            intermediate_size=64,
            attention="dsa",
            indexer=IndexerConfig(num_heads=2, head_dim=16, top_k=8),
            moe=MoeConfig(num_experts=4, expert_intermediate_size=16),
            engram=EngramConfig(layers=(0,), rows_per_head=50, head_dim=8),
            mtp_depth=1,
            mtp_loss_weight_final=0.1,
        ),
        parallel=ParallelConfig(data_parallel_size=ranks, expert_parallel_size=ranks),
        data=DataConfig(
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("code", "docs")},
            tokenizer=str(corpus / "tokenizer.json"),
            num_lanes=4,
        ),
        optim=OptimConfig(
            optimizer="muon",
            table_optimizer="sinkhorn",
            learning_rate=2e-2,
            warmup_steps=2,
            schedule="wsd",
            decay_fraction=0.5,
        ),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=8,
            micro_batch_size=2,
            batch_size_ramp=BatchSizeRampConfig(start=4, increment=4, samples=12),
            stages=(
                StageConfig(steps=10, sequence_length=32, indexer_stage="dense"),
                StageConfig(
                    steps=2,
                    sequence_length=32,
                    global_batch_size=4,
                    learning_rate=3e-2,
                    indexer_stage="dense_warmup",
                ),
                StageConfig(sequence_length=64, global_batch_size=4, micro_batch_size=1),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=99, keep_last=9),
        evaluate=EvaluateConfig(every_steps=0),
        monitor=MonitorConfig(tensorboard=False, wandb=False),
    )


class StopAfter(StopRequest):
    """Asks to stop once a number of steps are done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left == 0


def run(rank: int, config: RunConfig, run_dir: Path, parts: list[int]) -> list[int]:
    """Train in parts of so many steps, each from the checkpoint of the one before."""
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    return [train(config, run_dir, StopAfter(steps)) for steps in parts]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensors(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    whole = run_dir / "whole.pt"
    dcp_to_torch_save(str(run_dir / f"checkpoints/step-{step:08d}"), str(whole))
    loaded: dict[str, Any] = torch.load(whole, weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def uninterrupted(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stages")
    config = recipe(tiny_corpus, ranks=2)
    assert run_distributed(run, 2, config, run_dir, [STEPS + 1]) == [[0], [0]]
    return run_dir


def test_the_batches_and_tokens_of_every_step_are_those_of_its_stage(uninterrupted: Path) -> None:
    rows = records(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["stage"] for row in rows] == [0] * 10 + [1] * 2 + [2] * 4
    assert [row["global_batch_size"] for row in rows] == SEQUENCES
    assert [row["sequence_length"] for row in rows] == LENGTHS
    tokens = (n * length for n, length in zip(SEQUENCES, LENGTHS, strict=True))
    assert [row["tokens"] for row in rows] == list(accumulate(tokens))


def test_the_log_has_the_mean_of_the_bytes_that_ranks_send(
    tiny_corpus: Path, uninterrupted: Path
) -> None:
    config = recipe(tiny_corpus, ranks=2)
    rows = records(uninterrupted)
    for step in (1, 4, STEPS):  # of a batch that grows, a full one, longer sequences
        first, second = (step_volume(config, rank, step=step) for rank in range(2))
        wanted = {f"comm/{axis}_bytes": (first[axis] + second[axis]) / 2 for axis in first}
        found = {key: value for key, value in rows[step - 1].items() if key.startswith("comm/")}
        # Routing is not balanced: what leaves a rank is only about what it would be then.
        assert found.pop("comm/ep_bytes") == pytest.approx(wanted.pop("comm/ep_bytes"), rel=0.3)
        assert found == {key: value for key, value in wanted.items() if value}


def test_the_warm_up_of_the_indexer_moves_nothing_else(
    tiny_corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    rows = records(uninterrupted)
    assert ["loss_indexer" in row for row in rows] == [False] * 10 + [True] * 6
    assert [row["learning_rate"] for row in rows[10:12]] == [3e-2] * 2
    run_distributed(run, 2, recipe(tiny_corpus, ranks=2), tmp_path, [10, 2])
    before, after = tensors(tmp_path, 10), tensors(tmp_path, 12)
    weights = [key for key in before if key.startswith("model.")]
    changed = [key for key in weights if not torch.equal(before[key], after[key])]
    assert len(changed) > 3
    assert all(".indexer." in key for key in changed)
    # The bias of the routers moves without gradients.
    buffers = [key for key in before if key.startswith("buffer.")]
    assert buffers
    assert all(torch.equal(before[key], after[key]) for key in buffers)


def test_muon_and_sinkhorn_learn(uninterrupted: Path) -> None:
    losses = [row["loss_main"] for row in records(uninterrupted)]
    assert losses[0] == pytest.approx(6.24, abs=0.05)
    assert sum(losses[-4:]) / 4 < losses[0] - 0.5


def test_the_mtp_loss_weighs_less_from_the_decay_on(uninterrupted: Path) -> None:
    for row in records(uninterrupted):
        others = row["loss_main"] + row["loss_balance"] + row.get("loss_indexer", 0.0)
        weight = (row["loss"] - others) / row["loss_mtp"]
        assert weight == pytest.approx(0.3 if row["step"] <= 8 else 0.1)


def test_resume_in_any_stage_is_bitwise_the_same_run(
    tiny_corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    # Stops within the ramp, at its end, within the stages and at their ends.
    parts = [2, 1, 4, 3, 1, 99]
    codes = run_distributed(run, 2, recipe(tiny_corpus, ranks=2), tmp_path, parts)
    assert codes == [[85] * (len(parts) - 1) + [0]] * 2
    timed = (
        *("tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes"),
        "model_flops_utilization",
    )
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in timed} for row in records(path)]
        for path in (tmp_path, uninterrupted)
    )
    assert ours == theirs
    mine, other = tensors(tmp_path), tensors(uninterrupted)
    assert mine.keys() == other.keys()
    assert sum(key.startswith("optim.momentum_buffer.") for key in mine) > 20
    for key, value in other.items():
        same = torch.equal(mine[key], value) if torch.is_tensor(value) else mine[key] == value
        assert same, key


def test_a_run_goes_on_with_another_number_of_ranks(
    tiny_corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_distributed(run, 2, recipe(tiny_corpus, ranks=2), tmp_path, [5])
    assert run_distributed(run, 1, recipe(tiny_corpus, ranks=1), tmp_path, [4]) == [[85]]
    ours, theirs = ([row["loss"] for row in records(path)] for path in (tmp_path, uninterrupted))
    assert ours[:5] == theirs[:5]
    # fp32 sums in another order; momentum arrives whole or the first step would show it.
    assert ours[5] == pytest.approx(theirs[5], rel=1e-5)
    assert ours[6:] == pytest.approx(theirs[6:9], rel=1e-2)
