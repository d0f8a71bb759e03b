"""Weights that are cut over tensor-parallel ranks: the numbers of one rank that has them, in fp64.

Each run compares losses, gradient norms, every gathered gradient and the parameters after each step.
Gradients are of two kinds: of weights that are cut, and of those that every rank uses on its own
tokens.
"""

from dataclasses import fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from data.loader import build_loader
from parallel.backend.cpu import CpuBackend
from parallel.config import KernelConfig, ParallelConfig
from tests.harness import run_distributed
from tests.parity.test_layouts import ADAMW, MUON, recipe, whole
from tests.parity.test_layouts_hybrid import HYBRID, INDEXER
from train.build import build
from train.config import RunConfig
from train.evaluate import evaluate
from train.model.attention.config import MlaConfig
from train.model.config import Recompute
from train.step import train_step

STEPS = 2
SIZES = [field.name for field in fields(ParallelConfig) if field.name.endswith("_size")]
REFERENCE: Literal["reference"] = "reference"
LOSSES = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm")
EVALUATED = "validation/loss"
"""After the last step."""
MODELS = (
    "mhc",
    "hc",
    "plain",
    "single_pass",
    "dsa",
    "hybrid",
    "two_experts",
    "hash",
    "no_query_rank",
    "muon",
)
"""mhc, dsa and those after it: MLA, Engram, MTP and mHC unless the name says otherwise."""


def config_of(corpus: Path, model: str, parallel: ParallelConfig, micro: int = 4) -> RunConfig:
    residual = {"hc": "hc", "plain": "plain", "single_pass": "mhc_single_pass"}.get(model, "mhc")
    config = recipe(corpus, residual, 1, 1, micro, MUON if model == "muon" else ADAMW)
    changed = config.model
    if model == "dsa":
        changed = replace(changed, attention="dsa", indexer=replace(INDEXER, stage="sparse"))
    if model == "hybrid":
        changed = replace(changed, num_layers=3, attention="v4_hybrid", compressed=HYBRID)
        changed = replace(changed, indexer=replace(INDEXER, stage="sparse"))
    if model == "hash":
        changed = replace(changed, router="hash")
    if model == "no_query_rank":
        changed = replace(changed, mla=MlaConfig(q_lora_rank=None))
    return replace(config, model=changed, parallel=parallel)


def train_rank(rank: int, config: RunConfig, overloaded: bool) -> list[dict[str, Any]]:
    # The harness has joined the process group already.
    CpuBackend.init_process_group = lambda self, timeout_seconds: None  # type: ignore[method-assign]
    training = build(config)
    gradients: dict[str, NDArray[np.float64]] = {}

    def look() -> None:
        named = training.model.named_parameters()
        gradients.update({name: whole(p.grad) for name, p in named if p.grad is not None})

    if overloaded:
        for moe in training.model.moe_layers():
            assert moe.expert_bias is not None
            moe.expert_bias[:2] += 100.0
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
        record: dict[str, Any] = dict(train_step(training, next(batches)[0], step, look))
        if step == STEPS:
            record |= evaluate(training)
        record["gradients"] = dict(gradients)
        named = training.model.named_parameters()
        record["parameters"] = {name: whole(value) for name, value in named}
        biases = [moe.expert_bias for moe in training.model.moe_layers()]
        record["bias"] = [bias.numpy().copy() for bias in biases if bias is not None]
        found.append(record)
    return found if rank == 0 else []


@cache
def one_rank(corpus: Path, model: str) -> list[dict[str, Any]]:
    config = config_of(corpus, model, ParallelConfig(), micro=8)
    [found] = run_distributed(train_rank, 1, config, model == "two_experts", timeout=300.0)
    trace: list[dict[str, Any]] = found
    return trace


def world_size(parallel: ParallelConfig) -> int:
    data = parallel.data_replicate_parallel_size * parallel.data_parallel_size
    return data * parallel.context_parallel_size * parallel.tensor_parallel_size


def compare(
    corpus: Path, model: str, parallel: ParallelConfig, *, recompute: Recompute = "none"
) -> None:
    config = config_of(corpus, model, parallel, micro=2)
    config = replace(config, train=replace(config.train, recompute=recompute))
    ranks, overloaded = world_size(parallel), model == "two_experts"
    found = run_distributed(train_rank, ranks, config, overloaded, timeout=300.0)
    reference = one_rank(corpus, model)
    assert found[0][-1][EVALUATED] == pytest.approx(reference[-1][EVALUATED], rel=1e-12)
    for ours, theirs in zip(found[0], reference, strict=True):
        for name in (*LOSSES, *(name for name in theirs if name.startswith("dsa/"))):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours.get("moe/load_cv") == theirs.get("moe/load_cv")
        for mine, other in zip(ours["bias"], theirs["bias"], strict=True):
            assert np.array_equal(mine, other)
        assert ours["gradients"].keys() == theirs["gradients"].keys() == theirs["parameters"].keys()
        for name, value in theirs["gradients"].items():
            error = np.abs(ours["gradients"][name] - value).max()
            # Some gradients are sums that cancel to 0: nothing is relative to them.
            assert error <= 1e-9 * np.abs(value).max() + 1e-15 * theirs["grad_norm"], (name, error)
        for name, value in theirs["parameters"].items():
            error = np.abs(ours["parameters"][name] - value).max()
            assert error <= 1e-10, (name, error)


def layout(**ranks: int) -> ParallelConfig:
    sizes: dict[str, Any] = {f"{axis}_parallel_size": count for axis, count in ranks.items()}
    return ParallelConfig(**sizes)


def name_of(case: object) -> str:
    """Of a model or a layout, for the name of a test."""
    if not isinstance(case, ParallelConfig):
        return str(case)
    sizes = {name.removesuffix("_parallel_size"): getattr(case, name) for name in SIZES}
    return "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("mhc", layout(tensor=2, expert=2)),
        pytest.param("mhc", layout(tensor=2, data=2, expert=4), marks=pytest.mark.slow),
        pytest.param("two_experts", layout(tensor=4, expert=4), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_cut_weights_train_as_whole_ones(
    tiny_corpus: Path, model: str, parallel: ParallelConfig
) -> None:
    compare(tiny_corpus, model, parallel)


def same(a: Any, b: Any) -> bool:
    """Bitwise, for what a run returns."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b)


@pytest.mark.slow
def test_bf16_stays_close_and_repeats_bitwise(tiny_corpus: Path) -> None:
    config = config_of(tiny_corpus, "mhc", layout(tensor=2, expert=2))
    config = replace(config, train=replace(config.train, dtype="bf16"))
    found, again = (run_distributed(train_rank, 2, config, False)[0] for _ in range(2))
    assert same(found, again)
    reference = one_rank(tiny_corpus, "mhc")
    assert found[-1][EVALUATED] == pytest.approx(reference[-1][EVALUATED], rel=0.02)
    for ours, theirs in zip(found, reference, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=0.02), name


LAYOUTS = [
    layout(tensor=2),
    layout(tensor=4),
    layout(tensor=2, data=2),
    layout(tensor=2, data_replicate=2, expert=4),
    layout(tensor=2, data=2, context=2, expert=4),
]
OF_EVERY_MODEL = [layout(tensor=2, expert=2), layout(tensor=2, context=2, expert=2)]
IN_CI = [(model, OF_EVERY_MODEL[1]) for model in ("mhc", "dsa", "hybrid", "muon")] + [
    (model, OF_EVERY_MODEL[0]) for model in ("hc", "plain", "hash")
]
"""What is not exhaustive."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=name_of)
def test_every_layout(tiny_corpus: Path, parallel: ParallelConfig) -> None:
    compare(tiny_corpus, "mhc", parallel)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param(
            model,
            parallel,
            marks=() if (model, parallel) in IN_CI else pytest.mark.exhaustive,
            id=f"{model}-{name_of(parallel)}",
        )
        for parallel in OF_EVERY_MODEL
        for model in MODELS
    ],
)
def test_every_model(tiny_corpus: Path, model: str, parallel: ParallelConfig) -> None:
    compare(tiny_corpus, model, parallel)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["streams", "full"])
def test_recomputed_blocks(tiny_corpus: Path, recompute: Recompute) -> None:
    compare(tiny_corpus, "mhc", layout(tensor=2, expert=2), recompute=recompute)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("kernel", "dtype"), [("megatron", "fp32"), ("megatron_fused", "bf16")])
def test_megatrons_losses_train_alike(
    tiny_corpus: Path, kernel: Literal["megatron", "megatron_fused"], dtype: Literal["fp32", "bf16"]
) -> None:
    """The fused one is compiled here, for the host."""
    import_module(
        "parallel.megatron_cross_entropy"
    )  # it takes seconds: once, before the ranks fork
    ours, theirs = (
        replace(
            config,
            parallel=replace(config.parallel, kernels=KernelConfig(cross_entropy=name)),
            train=replace(config.train, dtype=dtype),
        )
        for config in [config_of(tiny_corpus, "mhc", layout(tensor=2, expert=2))]
        for name in (REFERENCE, kernel)
    )
    found = [run_distributed(train_rank, 2, c, False, timeout=500.0)[0] for c in (ours, theirs)]
    bound = 1e-6 if dtype == "fp32" else 2e-3
    assert found[1][-1][EVALUATED] == pytest.approx(found[0][-1][EVALUATED], rel=bound)
    for mine, other in zip(*found, strict=True):
        for name in LOSSES:
            assert other[name] == pytest.approx(mine[name], rel=bound), name
