"""A small study of real runs, from the command line to the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.niah import NiahShape, build_niah

ROOT = Path(__file__).parents[2]
SHAPE = NiahShape(
    tokens=48, needles=2, questions=2, words=3, train_documents=64, validation_documents=16
)
STUDY = {
    "name": "tiny",
    "description": "tiny",
    "question": "Does it run?",
    "expectation": "Nothing.",
    "scale_note": "Nothing.",
    "recipe": "engram_nano",
    "overrides": [
        *("data=niah", "data.sequence_length=48", "train.global_batch_size=8"),
        *("model.hidden_size=32", "model.num_layers=2", "model.vocab_size=512"),
        *("evaluate.num_questions=2", "evaluate.num_sequences=16", "evaluate.every_steps=2"),
        *("monitor.tensorboard=false", "monitor.wandb=false", "launch.threads_per_rank=1"),
        *("parallel.expert_parallel_size=1", "optim.warmup_steps=1"),
    ],
    "arms": {
        "on": ["parallel.data_parallel_size=1"],
        "off": ["parallel.data_parallel_size=1", "model.engram=null"],
        "two_ranks": ["parallel.data_parallel_size=2"],
    },
    "hypotheses": [
        {
            "name": "found",
            "statement": "more values are found",
            "arm": "on",
            "against": "off",
            "metric": "niah/accuracy",
            "direction": "higher",
        }
    ],
    "budget_tokens": 4 * 8 * 48,
    "seeds": 1,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_study_of_needles_trains_checks_and_reports(tiny_corpus: Path, tmp_path: Path) -> None:
    """In two ranks as in one: the checksums, the share of values found and their loss."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("docs", "tokenizer.json"):
        (corpus / name).symlink_to(tiny_corpus / name)
    build_niah(corpus, SHAPE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "ablate", "tiny.yaml", "-o", "report"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.count("passed: ") == 4
    assert "found: more values are found: undecided at this budget" in report
    for name in ("loss.png", "niah_accuracy.png", "report.html"):
        assert (tmp_path / "report" / name).stat().st_size > 10_000

    directory = tmp_path / "runs" / "study-tiny"
    one, off, two = (records(directory / f"{arm}-seed0") for arm in ("on", "off", "two_ranks"))
    assert len(one) == 4
    for mine, theirs, apart in zip(one, two, off, strict=True):
        assert mine["data/checksum"] == theirs["data/checksum"] == apart["data/checksum"] > 0
    assert len({row["data/checksum"] for row in one}) == 4
    evaluated = [row for row in one if "niah/accuracy" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    for mine, theirs in zip(evaluated, (two[1], two[3]), strict=True):
        # 16 documents with two values each.
        assert (mine["niah/accuracy"] * 32).is_integer()
        assert mine["niah/accuracy"] == theirs["niah/accuracy"]
        assert mine["niah/loss"] == pytest.approx(theirs["niah/loss"], rel=1e-4)
        assert mine["validation/checksum"] == theirs["validation/checksum"]
    cost = json.loads((directory / "on-seed0" / "cost.jsonl").read_text())
    assert cost["cpu_seconds"] > 0.5
    # One core at most: one rank with one thread, and the launcher that waits for it.
    assert cost["cpu_seconds"] < 2 * cost["seconds"]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
