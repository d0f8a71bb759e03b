"""Runs on text, images and clips through the command line: metrics, damage, and going on bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.unit.data.albums import document, image, some_documents, write_album

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 6
TRAIN = [
    *("train.global_batch_size=4", "train.micro_batch_size=1", "data.sequence_length=64"),
    *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2"),
    *(f"train.steps={STEPS}", "checkpoint.every_steps=3", "checkpoint.keep_last=9"),
    *("evaluate.every_steps=6", "evaluate.num_sequences=2", "optim.warmup_steps=3"),
    *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512", "monitor.wandb=false"),
    *("data.image.max_rows=8", "data.faults.damaged=skip", "data.faults.max_skipped_fraction=1.0"),
]


def mneme(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, on an album of which one image in four is cut short."""
    folder = tmp_path_factory.mktemp("album")
    documents = some_documents(12)
    for number in (4, 7, 10):
        short = image(number)
        short = replace(short, payload=short.payload[:-60])
        documents[number] = document(f"album/{number:03d}", [9, short])
    tokenizer = tiny_corpus / "tokenizer.json"
    write_album(folder, documents, tokenizer=tokenizer, vocab_size=512)
    recipe = folder / "seeing.yaml"
    recipe.write_text(
        "defaults: [v4_nano_mm]\n"
        "data:\n"
        f"  tokenizer: {tokenizer}\n"
        "  sources:\n"
        f"    code: {{path: {tiny_corpus}/code}}\n"
        f"    docs: {{path: {tiny_corpus}/docs}}\n"
        f"    pictures: {{path: {folder}/album}}\n"
    )
    run = folder / "run"
    mneme("train", str(recipe), *TRAIN, "--run-dir", str(run))
    return run


def test_the_log_says_what_was_trained_on_and_what_was_left_out(run_dir: Path) -> None:
    metrics, events = rows(run_dir / "metrics.jsonl"), rows(run_dir / "events.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for row in metrics:
        tokens = sum(row[f"data/{name}_tokens"] for name in ("code", "docs", "pictures"))
        assert 0 < tokens <= 4 * 64
        assert row["data/packing_efficiency"] == pytest.approx(tokens / (4 * 64))
    assert sum(row["data/pictures_tokens"] for row in metrics) > 0
    skipped = [event for event in events if event["event"] == "skipped_sample"]
    in_training = sum(row["data/skipped_samples"] for row in metrics)
    assert 0 < in_training <= len(skipped)  # those of the evaluation are told too
    assert {event["rank"] for event in skipped} <= {0, 1}
    for event in skipped:
        assert event["key"] in {"album/004", "album/007", "album/010"}
        assert (event["source"], event["cause"]) == ("pictures", "undecodable")
        assert event["shard"].endswith(".tar")


def determined(run_dir: Path) -> list[dict[str, Any]]:
    names = ("step", "tokens", "grad_norm", "validation/loss")
    return [
        {k: v for k, v in row.items() if k in names or k.startswith(("loss", "data/"))}
        for row in rows(run_dir / "metrics.jsonl")
    ]


def tensors(run_dir: Path, scratch: Path) -> dict[str, Any]:
    dcp_to_torch_save(str(run_dir / f"checkpoints/step-{STEPS:08d}"), str(scratch))
    loaded: dict[str, Any] = torch.load(scratch, weights_only=False)
    return loaded


def test_a_run_goes_on_bit_for_bit_with_worker_processes(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    shutil.rmtree(other / f"checkpoints/step-{STEPS:08d}")
    mneme("resume", str(other), "data.num_workers=2", "data.prefetch_batches=3")
    assert determined(other) == determined(run_dir)
    ours, theirs = tensors(other, tmp_path / "ours"), tensors(run_dir, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert any("vision" in name for name in ours)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            np.testing.assert_array_equal(ours[name].numpy(), value.numpy(), err_msg=name)
        else:
            assert ours[name] == value, name
