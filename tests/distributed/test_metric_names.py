"""A real run of the V4 stack logs every metric that is promised, and its numbers make sense."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.expert_load import decode

PROMISED = """
step tokens loss loss_main loss_mtp loss_indexer loss_balance grad_norm learning_rate
tokens_per_second model_flops_utilization step_seconds data_wait_seconds peak_memory_bytes
mhc/gain_forward_max mhc/gain_backward_max mhc/composite_gain_forward mhc/composite_gain_backward
mhc/doubly_stochastic_error mhc/stream_norm_ratio
moe/load_max_over_mean moe/load_cv moe/router_entropy moe/dead_experts moe/bias_abs_max
engram/gate_mean engram/unique_row_fraction engram/fetch_seconds engram/fetch_bytes
engram/prefetch_hidden_fraction dsa/indexer_kl dsa/topk_recall
data/code_tokens data/docs_tokens data/skipped_samples data/packing_efficiency
validation/loss
"""
OVERRIDES = [
    *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2"),
    *("train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=1"),
    "optim.warmup_steps=2",
    *("data.sequence_length=64", "evaluate.every_steps=4", "evaluate.num_sequences=2"),
    *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512"),
    *("monitor.wandb=false", "monitor.residual_every_steps=2"),
    *("monitor.expert_load_every_steps=2", "monitor.peak_flops_per_device=1e12"),
]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_logs_all_metrics(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "defaults: [v4_nano]\n"
        "data:\n"
        f"  tokenizer: {tiny_corpus}/tokenizer.json\n"
        "  sources:\n"
        f"    code: {{path: {tiny_corpus}/code}}\n"
        f"    docs: {{path: {tiny_corpus}/docs}}\n"
    )
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), *OVERRIDES]
    subprocess.run([*command, "--run-dir", str(run_dir)], check=True, timeout=190)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*rows)
    assert set(PROMISED.split()) <= logged
    by_site = {f"mhc/site_{site:03d}/gain_forward" for site in range(4)}
    assert by_site <= logged
    for row in rows:
        assert 0 < row["model_flops_utilization"] < 1
        assert row["tokens_per_second"] == pytest.approx(256 / row["step_seconds"])

    loads = [json.loads(line) for line in (run_dir / "expert_load.jsonl").read_text().splitlines()]
    assert [row["step"] for row in loads] == [2, 4]
    for row in loads:
        load, record = decode(row), rows[row["step"] - 1]
        assert load.mean(axis=1) == pytest.approx(np.ones(len(load)), abs=0.005)
        assert load.max(axis=1).mean() == pytest.approx(record["moe/load_max_over_mean"], abs=0.01)
        assert (load == 0).sum() == record["moe/dead_experts"]

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert {name for name in logged if name != "step"} == set(events.Tags()["scalars"])
    start = json.loads((run_dir / "events.jsonl").read_text().splitlines()[0])
    assert "1e+12 operations/s (monitor.peak_flops_per_device)" in start["detail"]
