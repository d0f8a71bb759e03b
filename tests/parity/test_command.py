"""`mneme parity` finds faults: it names the tensor where they begin and the axes that are to blame.

The command and its ranks are real, except that ranks are forked instead of started; the faults are
put into the forked ranks.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import parallel.gradients
import parallel.pipeline
import parallel.torch_compat
import train.step
from launch.cli import main
from launch.parity import command
from launch.run_dir import write_status
from launch.validate import world_size
from parallel.backend.cpu import CpuBackend
from parallel.backend.gather import reduce_scatter
from parallel.expert import AllToAllDispatcher
from parallel.sequence import SequencePart
from tests.harness import run_distributed
from train.config import RunConfig
from train.metrics import Record
from train.parity.run import compare
from train.stop import StopRequest
from train.training import Training

Fault = Callable[[], None]

RECIPE = """
defaults:
  - v4_nano
model:
  vocab_size: 512
  hidden_size: 32
  num_layers: 2
  intermediate_size: 64
  attention: mla
  moe: {num_experts: 4, expert_intermediate_size: 16, balance_loss_weight: 0.01}
  engram: {rows_per_head: 50, head_dim: 8}
data:
  sources:
    code: {path: CORPUS/code}
    docs: {path: CORPUS/docs}
  tokenizer: CORPUS/tokenizer.json
  sequence_length: 32
train:
  global_batch_size: 8
  micro_batch_size: 2
"""


def sound() -> None:
    """No fault."""


def one_rank_scales_expert_rows() -> None:
    right = AllToAllDispatcher.__call__

    def wrong(self: AllToAllDispatcher, *args: Any) -> Callable[[], Tensor]:
        is_broken = self.group.size() > 1 and dist.get_rank() == 1
        collect = right(self, *args)
        return lambda: collect() * (1.0 + 1e-6 * is_broken)

    AllToAllDispatcher.__call__ = wrong  # type: ignore[method-assign, assignment]


def gradients_are_averaged() -> None:
    def averaged(part: Tensor, summand: Tensor, group: dist.ProcessGroup) -> None:
        reduce_scatter(part, summand, group)
        part /= group.size()

    parallel.torch_compat.reduce_scatter = averaged  # type: ignore[attr-defined]


def load_counts_stay_local() -> None:
    def update(training: Training) -> Record:
        for moe in training.model.moe_layers():
            moe.router.update_bias(moe.take_load_counts())
        return {}

    train.step.update_router_bias = update


def balance_counts_stay_local() -> None:
    SequencePart.sum_over = lambda self, x: x  # type: ignore[method-assign]


def context_and_tensor_ranks_sum_wrongly() -> None:
    right = SequencePart.scatter_queries

    def wrong(self: SequencePart, x: Tensor) -> Tensor:
        is_broken = self.split.context is not None and self.split.tensor is not None
        return right(self, x) * (1.0 + 1e-9 * is_broken)

    SequencePart.scatter_queries = wrong  # type: ignore[method-assign]


def stages_hand_on_something_else() -> None:
    right = parallel.pipeline._crossing
    parallel.pipeline._crossing = lambda x: right(x * (1.0 + 1e-9))


def the_norm_counts_replicas() -> None:
    parallel.gradients.replicas = lambda gradient, stage_size: 1


def a_rank_fails() -> None:
    def fail(training: Training, batch: object) -> None:
        if dist.get_rank() == 1:
            raise ValueError("the fault")

    train.step.check_batch = fail


def rank_with(rank: int, fault: Fault, config: RunConfig, run_dir: Path) -> int:
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    fault()
    return compare(config, run_dir, StopRequest())


def run_forked(fault: Fault, run_dir: Path, config: RunConfig, *, module: str) -> int:
    """In place of `launch.local.run_ranks`."""
    assert module == "train.parity.run"
    ranks = world_size(config)
    state, reason, code = "done", "all steps done", 0
    try:
        run_distributed(rank_with, ranks, fault, config, run_dir)
    except AssertionError as error:
        state, reason, code = "failed", str(error).strip().split("\n")[-1], 1
    write_status(run_dir, state=state, reason=reason, ranks=ranks)
    return code


@pytest.fixture
def parity(
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Type `mneme parity tiny.yaml ...` with a fault; gives exit code and what was printed."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("CORPUS", str(tiny_corpus)), encoding="utf-8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(fault: Fault, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(command, "run_ranks", partial(run_forked, fault))
        code = main(["parity", str(recipe), *words])
        return code, capsys.readouterr().out

    return run


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def rows(answer: str) -> dict[str, dict[str, Any]]:
    return {row["layout"]: row for row in json.loads(answer)["layouts"]}


@pytest.mark.slow
def test_layouts_that_compute_the_same(
    parity: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    layouts = ("--layout", "dp2,ep2", "--layout", "dpr2")
    code, answer = parity(sound, *layouts, "--steps", "2", "--json")
    assert code == 0, answer
    assert json.loads(answer)["recipe"] == str(tmp_path / "tiny.yaml")
    found = rows(answer)
    assert list(found) == ["dp2,ep2", "dpr2"]
    for row in found.values():
        assert row["ok"], row
        assert row["first_difference"] is None
        assert row["loss_error"] <= 1e-12
        assert row["grad_norm_error"] <= 1e-12
        assert 0.0 < row["max_grad_error"] <= 1e-9
        assert 0.0 < row["max_parameter_error"] <= 1e-10
    assert list(tmp_path.glob("mneme-parity-*")) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_layouts_of_all_axes(parity: Callable[..., tuple[int, str]]) -> None:
    words = (
        *("model.num_layers=4", "parallel.pipeline_schedule=zbv"),
        *("parallel.pipeline_stages_per_rank=2", "parallel.reshard_after_forward=false"),
    )
    layouts = ("--layout", "pp2,tp2", "--layout", "pp2,cp2,tp2,ep4", "--layout", "dpr2,tp2,ep2")
    code, table = parity(sound, *words, *layouts)
    assert code == 0, table
    assert table.count(" ok ") == 3


@pytest.mark.parametrize(
    ("fault", "layout", "first", "blamed"),
    [
        slow(one_rank_scales_expert_rows, "dp2,ep2", "output of layers.1.ffn", "ep"),
        slow(gradients_are_averaged, "dp2,ep2", "gradient of mtp.0.norm.weight", "dp"),
        slow(
            load_counts_stay_local, "dp2", "layers.1.ffn.router.expert_bias after the update", "dp"
        ),
        slow(the_norm_counts_replicas, "dpr2", "gradient norm", "dpr"),
        slow(stages_hand_on_something_else, "pp2,dp2", "output of layers.1.engram", "pp"),
        slow(balance_counts_stay_local, "cp2,tp2", "loss_balance", "cp and tp, each alone"),
        pytest.param(
            context_and_tensor_ranks_sum_wrongly,
            "dp2,cp2,tp2",
            "output of embedding",
            "cp together with tp",
            marks=[pytest.mark.slow, pytest.mark.exhaustive],
        ),
    ],
)
def test_a_fault_is_named(
    parity: Callable[..., tuple[int, str]], fault: Fault, layout: str, first: str, blamed: str
) -> None:
    code, answer = parity(fault, "--layout", layout, "--json")
    assert code == 1
    row = rows(answer)[layout]
    assert not row["ok"]
    assert row["first_difference"] == f"{first} in step 1, by {blamed}"
    assert row["axes"] == re.findall(r"cp|tp|pp|dpr|dp|ep", blamed)


def test_the_table_says_what_was_compared_and_what_differs(
    parity: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    words = ("model.mtp_depth=0", "optim.eps=1e-8", "--layout", "dp1", "--layout", "dp2")
    code, table = parity(gradients_are_averaged, *words)
    assert code == 1
    lines = table.splitlines()
    assert lines[0].endswith(
        "tiny.yaml in fp64 against one rank: 1 optimizer step, 8 sequences of 32 tokens"
    )
    assert re.fullmatch(r"\d+ outputs, \d+ gradients, \d+ parameters and buffers", lines[1])
    assert lines[2].split() == [
        "layout",
        "ranks",
        "loss",
        "gradient",
        "norm",
        "gradient",
        "parameter",
        "worst",
        "gradient",
    ]
    assert lines[3].split() == ["at", "most", "1e-12", "1e-12", "1e-09", "1e-10"]
    same = lines[4].split()
    assert same[:7] == ["dp1", "1", "0.0e+00", "0.0e+00", "0.0e+00", "0.0e+00", "ok"]
    assert lines[5].split()[6] == "DIFFERS"
    assert lines[5].split()[4] == "5.0e-01"
    assert lines[6] == (
        "dp2 differs first in the gradient of head.weight in step 1, by dp (5.0e-01)"
    )
    assert re.fullmatch(r"\d+ s", lines[7])


@pytest.mark.slow
def test_a_rank_that_fails_is_told_and_leaves_its_logs(
    parity: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, table = parity(a_rank_fails, "--layout", "dp2")
    assert code == 1
    assert "FAILED" in table
    assert "dp2 failed: ValueError: the fault" in table
    [root] = tmp_path.glob("mneme-parity-*")
    assert (root / "dp2/status.json").exists()
    assert list(root.glob("*/tensors")) == []


@pytest.mark.slow
def test_fp32_is_bounded_by_its_own_noise(parity: Callable[..., tuple[int, str]]) -> None:
    code, table = parity(sound, "--layout", "dp2,ep2", "--dtype", "fp32")
    assert code == 0, table
    assert "in fp32 against one rank" in table
    assert "optim.eps=1e-08 in place of 1e-20, with which an update may be" in table
    assert "one rank with other microbatches differs from itself by: output" in table
    code, answer = parity(gradients_are_averaged, "--layout", "dp2", "--dtype", "fp32", "--json")
    assert code == 1
    assert rows(answer)["dp2"]["first_difference"] == (
        "gradient of mtp.0.norm.weight in step 1, by dp"
    )


def test_everything_that_is_wrong_is_said_before_anything_starts(
    parity: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layouts = ["--layout", "dp3,ep2", "--layout", "zz2"]
    wrong = ["parallel.data_parallel_size=2", "train.dtype=bf16", "parallel.data_engine=deepspeed"]
    code = main(["parity", str(tmp_path / "tiny.yaml"), *layouts, *wrong, "--steps", "0"])
    assert code == 2
    said = capsys.readouterr().err
    for problem in (
        "--layout dp3,ep2: parallel.expert_parallel_size=2: must divide",
        "--layout dp3,ep2: train.global_batch_size=8: must be a multiple",
        "--layout zz2: zz2: an axis (dp, dpr, tp, pp, cp, ep) and its size, such as dp2,ep2",
        "parallel.data_parallel_size=2: the layouts say the sizes of axes; use --layout",
        "--steps 0: the recipe has train.steps=80; use 1 to that",
        "train.dtype=bf16: use --dtype, with fp64 or fp32",
        "parallel.data_engine=deepspeed: keeps gradients to itself",
    ):
        assert problem in said, said
    assert list(tmp_path.glob("mneme-parity-*")) == []
    with pytest.raises(SystemExit) as left:
        main(["parity", "v4_nano"])
    assert left.value.code == 2
    assert "required: --layout" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_with_real_processes(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("CORPUS", str(tiny_corpus)), encoding="utf-8")
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "parity",
            "tiny.yaml",
            "--layout",
            "dp2,ep2",
            "--json",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert rows(found.stdout)["dp2,ep2"]["ok"]
    assert list(tmp_path.glob("mneme-parity-*")) == []
