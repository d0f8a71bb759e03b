"""Real training at toy size: hyper-connections break the bound on the gain, mHC keeps near 1."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose
from tests.distributed.test_alarms import events, train_rank
from tests.harness import run_distributed
from train.config import RunConfig

STEPS = 60


def nano(corpus: Path, residual: str) -> RunConfig:
    overrides = [
        *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
        *(f"model.residual={residual}", "model.vocab_size=512", f"train.steps={STEPS}"),
        *("evaluate.every_steps=0", "checkpoint.every_steps=999", "train.global_batch_size=8"),
        *("monitor.wandb=false", "monitor.tensorboard=false"),
    ]
    config = compose("mhc_nano", overrides).config
    sources = {
        name: replace(source, path=str(corpus / name))
        for name, source in config.data.sources.items()
    }
    tokenizer = str(corpus / "tokenizer.json")
    return replace(config, data=replace(config.data, sources=sources, tokenizer=tokenizer))


def gains(corpus: Path, run_dir: Path, residual: str) -> dict[str, list[float]]:
    """The worst composite gains of every look."""
    run_dir.mkdir()
    run_distributed(train_rank, 1, nano(corpus, residual), run_dir, timeout=280.0)
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    looks = [row for row in rows if "mhc/composite_gain_forward" in row]
    assert [row["step"] for row in looks] == list(range(10, STEPS + 1, 10))
    names = ("forward", "forward_min", "backward")
    return {name: [row[f"mhc/composite_gain_{name}"] for row in looks] for name in names}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hyper_connections_raise_the_alarm_and_mhc_does_not(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    free = gains(tiny_corpus, tmp_path / "hc", "hc")
    assert max(free["forward"]) > 5
    raised = [detail for _, event, detail in events(tmp_path / "hc") if event == "alarm"]
    assert any("mhc/composite_gain_forward" in detail for detail in raised)

    kept = gains(tiny_corpus, tmp_path / "mhc", "mhc")
    assert max(kept["forward"]) < 1 + 1e-3
    assert min(kept["forward_min"]) > 1 - 1e-3
    assert 1 <= max(kept["backward"]) < 1.6
    assert not [row for row in events(tmp_path / "mhc") if row[1] == "alarm"]
