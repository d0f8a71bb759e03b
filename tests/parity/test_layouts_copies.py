"""Copies of the parameters (HSDP), whole experts and Muon train as one rank does, in fp64.

Muon and AdamW hardly notice a factor on a gradient, so gradients are compared as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.layout import ParallelLayout
from tests.checkpoints import save
from tests.harness import run_distributed
from tests.parity import test_layouts_pipeline
from tests.parity.test_layouts import ADAMW, MUON, STEPS, recipe, whole
from train.build import build
from train.checkpoint.state import Progress, restore
from train.config import OptimConfig, RunConfig
from train.evaluate import evaluate
from train.step import train_step
from train.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Case:
    copies: int
    data: int
    expert: int
    micro: int
    optim: OptimConfig = MUON
    whole_experts: bool = False
    reshard: bool = True
    residual: str = "mhc"
    tensor: int = 1
    context: int = 1

    def recipe(self, corpus: Path) -> RunConfig:
        config = recipe(corpus, self.residual, self.data, self.expert, self.micro, self.optim)
        parallel = replace(
            config.parallel,
            data_replicate_parallel_size=self.copies,
            expert_sharding="replicate" if self.whole_experts else "shard",
            reshard_after_forward=self.reshard,
            tensor_parallel_size=self.tensor,
            context_parallel_size=self.context,
        )
        return replace(config, parallel=parallel)

    def __str__(self) -> str:
        whole_experts = "-whole_experts" if self.whole_experts else ""
        dense = f"copies{self.copies}-data{self.data}-context{self.context}-tensor{self.tensor}"
        experts = f"expert{self.expert}{whole_experts}"
        return f"{dense}-{experts}-{self.optim.optimizer}-{self.residual}"


ONE_RANK = Case(1, 1, 1, micro=8)
COPIED = Case(2, 2, 2, micro=1)
SHARDED = Case(1, 2, 2, micro=4)
WHOLE_EXPERTS = Case(1, 4, 2, micro=1, whole_experts=True)
CASES = [
    COPIED,
    Case(2, 2, 1, micro=1, optim=ADAMW),
    # One copy has no room for all experts: these are sharded over both.
    Case(2, 1, 2, micro=2),
    WHOLE_EXPERTS,
    Case(2, 2, 2, micro=1, optim=ADAMW, residual="mhc_single_pass"),
    Case(1, 4, 2, micro=2, optim=ADAMW, whole_experts=True, reshard=False),
    # More ranks than experts.
    Case(1, 8, 1, micro=1),
    # Matrices that are cut twice, along one dim or both.
    Case(1, 2, 2, micro=2, tensor=2),
    Case(2, 1, 4, micro=4, tensor=2, context=2, whole_experts=True),
]
MORE = [
    Case(2, 1, 1, micro=1, reshard=False),
    Case(2, 1, 2, micro=1, optim=ADAMW, residual="plain"),
    Case(2, 2, 1, micro=1, whole_experts=True, residual="mhc_single_pass"),
    Case(2, 4, 2, micro=1),
    Case(2, 1, 2, micro=2, tensor=2),
    Case(2, 2, 2, micro=2, tensor=2, optim=ADAMW),
]
"""Cases that show no more than those together."""


def run(function: Callable[..., Any], config: RunConfig, *args: Any) -> list[Any]:
    """Results of all ranks; eight take their time on two cores."""
    ranks = ParallelLayout.from_config(config.parallel).world_size
    return run_distributed(function, ranks, config, *args, timeout=250.0)


def start(config: RunConfig) -> tuple[Training, Any]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    batches = build_loader(
        config.data,
        split="train",
        seed=0,
        global_batch_size=config.train.global_batch_size,
        data_rank=training.data_rank,
        data_size=training.data_size,
    )
    return training, batches


def train_rank(rank: int, config: RunConfig) -> dict[str, Any]:
    """What each step reported; gradients and parameters of the last one."""
    training, batches = start(config)
    update, gradients = training.engine.step, dict[str, Any]()

    def keep(learning_rate: float) -> None:
        gradients.update((n, p.grad) for n, p in training.model.named_parameters())
        update(learning_rate)

    training.engine.step = keep  # type: ignore[method-assign]
    records: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        record: dict[str, Any] = dict(train_step(training, next(batches)[0], step))
        if step == 2:
            record |= evaluate(training)
        biases = [moe.expert_bias for moe in training.model.moe_layers()]
        record["bias"] = [bias.numpy().copy() for bias in biases if bias is not None]
        records.append(record)
    gathered = {name: whole(value) for name, value in gradients.items()}
    return {"steps": records, "gradients": gathered, "parameters": weights(training)}


def weights(training: Training) -> dict[str, NDArray[np.float64]]:
    return {name: whole(value) for name, value in training.model.named_parameters()}


@cache
def one_rank(corpus: Path, residual: str, optim: OptimConfig) -> dict[str, Any]:
    case = replace(ONE_RANK, residual=residual, optim=optim)
    [found] = run(train_rank, case.recipe(corpus))
    trained: dict[str, Any] = found
    return trained


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in MORE)], ids=str
)
def test_copies_train_as_one_rank(tiny_corpus: Path, case: Case) -> None:
    reference = one_rank(tiny_corpus, case.residual, case.optim)
    found = run(train_rank, case.recipe(tiny_corpus))
    for ours, theirs in zip(found[0]["steps"], reference["steps"], strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["moe/load_cv"] == theirs["moe/load_cv"]
        for mine, other in zip(ours["bias"], theirs["bias"], strict=True):
            assert np.array_equal(mine, other)
    evaluations = [trained["steps"][1]["validation/loss"] for trained in (found[0], reference)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-12)
    for name, value in reference["gradients"].items():
        error = np.abs(found[0]["gradients"][name] - value).max()
        assert error <= 1e-9 * np.abs(value).max(), (name, error)
    for name, value in reference["parameters"].items():
        error = np.abs(found[0]["parameters"][name] - value).max()
        assert error <= 1e-10, (name, error)
        # Every copy went the same way, bit by bit.
        for other in found[1:]:
            assert np.array_equal(other["parameters"][name], found[0]["parameters"][name]), name


@pytest.mark.parametrize("case", [COPIED, WHOLE_EXPERTS], ids=str)
def test_bf16_with_copies_stays_close(tiny_corpus: Path, case: Case) -> None:
    """The fp32 modules of the streams have their own units, and these their own copies."""
    config = case.recipe(tiny_corpus)
    bf16 = replace(config, train=replace(config.train, dtype="bf16"))
    found = run(train_rank, bf16)
    reference = one_rank(tiny_corpus, case.residual, case.optim)
    for ours, theirs in zip(found[0]["steps"], reference["steps"], strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.02), name
    for other in found[1:]:
        for name, value in found[0]["parameters"].items():
            assert np.array_equal(other["parameters"][name], value), name


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_sharding": "replicate"},
        pytest.param(
            {"tensor_parallel_size": 2, "expert_parallel_size": 2}, marks=pytest.mark.exhaustive
        ),
    ],
    ids=str,
)
def test_stages_have_copies_and_owners_of_their_own(
    tiny_corpus: Path, keys: dict[str, Any]
) -> None:
    config = test_layouts_pipeline.stack(tiny_corpus, "mhc", optim=MUON)
    config = replace(config, train=replace(config.train, micro_batch_size=1))
    keys = {"data_replicate_parallel_size": 2, "expert_parallel_size": 1} | keys
    found = test_layouts_pipeline.run(test_layouts_pipeline.in_pipeline(config, 2, **keys))
    one_rank = test_layouts_pipeline.reference(tiny_corpus, "mhc", MUON)
    test_layouts_pipeline.assert_same(found, one_rank)


def states(training: Training) -> dict[str, NDArray[np.float64]]:
    """Parameters and the states of their optimizers, gathered."""
    found = weights(training)
    for name, value in training.engine.state().items():
        if name.startswith("optim."):
            found[name] = whole(value)
    return found


def save_rank(rank: int, config: RunConfig, run_dir: Path) -> dict[str, NDArray[np.float64]]:
    training, batches = start(config)
    batch, lanes = next(batches)
    train_step(training, batch, 1)
    progress = Progress(step=1, tokens=0, data_state=lanes)
    save(training, run_dir, progress)
    return states(training)


def load_rank(rank: int, config: RunConfig, run_dir: Path) -> dict[str, NDArray[np.float64]]:
    training, _ = start(config)
    model, engine = training.model, training.engine
    rng_state = training.backend.rng_state()
    lanes = training.data_lanes()
    progress = restore(
        run_dir, model, engine, lanes, rng_state=rng_state, tables=training.tables, corpus=""
    )
    assert progress is not None
    assert progress.data_state.keys() == set(lanes)
    assert all(progress.data_state.values())
    return states(training)


MOVES = [
    (COPIED, (ONE_RANK, SHARDED, WHOLE_EXPERTS, Case(2, 1, 1, micro=2))),
    (SHARDED, (COPIED, WHOLE_EXPERTS)),
    (WHOLE_EXPERTS, (COPIED, ONE_RANK, SHARDED)),
    (ONE_RANK, (COPIED, WHOLE_EXPERTS)),
]


@pytest.mark.parametrize(("saved_by", "loaded_by"), MOVES)
def test_a_checkpoint_moves_between_copies_shards_and_one_rank(
    tiny_corpus: Path, tmp_path: Path, saved_by: Case, loaded_by: tuple[Case, ...]
) -> None:
    saved = run(save_rank, saved_by.recipe(tiny_corpus), tmp_path)[0]
    for case in loaded_by:
        for loaded in run(load_rank, case.recipe(tiny_corpus), tmp_path):
            assert loaded.keys() == saved.keys()
            for name, value in saved.items():
                assert np.array_equal(loaded[name], value), (str(case), name)
