"""A vendor's package that is installed and broken (torch_npu without CANN) breaks nothing of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REASON = "libhccl.so: cannot open shared object file: No such file or directory"
TINY = (
    *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1", "train.steps=1"),
    *("model.num_layers=2", "model.hidden_size=32", "data.sequence_length=64"),
    *("train.global_batch_size=2", "train.micro_batch_size=2", "data.num_lanes=2"),
    *("optim.warmup_steps=0", "evaluate.every_steps=0"),
)


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment with a torch_npu as its wheel is, whose libraries are missing."""
    site = tmp_path / "site"
    (site / "torch_npu").mkdir(parents=True)
    (site / "torch_npu/__init__.py").write_text(f"raise ImportError({REASON!r})\n")
    info = site / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_", "MNEME_"))}
    return {**inherited, "PYTHONPATH": f"{ROOT}:{site}"}


def run(environment: dict[str, str], *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_goes_on_and_says_what_it_left_out(
    broken: dict[str, str], tiny_corpus: Path, tmp_path: Path
) -> None:
    plain = run(broken, "-c", "import torch")
    assert plain.returncode == 1, "it is as broken as the real one"
    assert "Failed to load the backend extension: torch_npu" in plain.stderr

    paths = [f"data.tokenizer={tiny_corpus}/tokenizer.json"]
    paths += [f"data.sources.{name}.path={tiny_corpus}/{name}" for name in ("code", "docs")]
    run_dir = str(tmp_path / "run")
    train = ["-m", "launch.cli", "train", "v4_nano", *TINY, *paths, "--run-dir", run_dir]
    done = run(broken, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run/logs/attempt-1/rank-0.log").read_text()
    assert f"backend ascend cannot be used here: `import torch_npu` fails: {REASON}" in log

    wanted = run({**broken, "MNEME_BACKEND": "ascend"}, *train[:-1], str(tmp_path / "other"))
    assert wanted.returncode == 1
    assert (
        f"MNEME_BACKEND=ascend: backend ascend cannot be used here: `import torch_npu` fails: {REASON}"
        in wanted.stderr
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_doctor_explains_it(broken: dict[str, str]) -> None:
    done = run(broken, "-m", "launch.cli", "doctor", "--json", "--nproc", "1")
    answer = json.loads(done.stdout)
    rows = {check["name"]: check for check in answer["checks"]}
    assert (done.returncode, answer["ok"]) == (0, True)
    plain = rows["import torch with torch_npu"]
    assert plain["ok"] is None
    assert REASON in plain["found"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in plain["fix"]
    assert REASON in rows["vendor's package"]["found"]
    assert "set_env.sh" in rows["vendor's package"]["fix"]
