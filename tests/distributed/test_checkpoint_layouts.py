"""A run goes on in another layout as if nothing had happened: 20 steps beside the run that never stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import ParallelLayout
from tests.checkpoints import records, small_run, train_here
from tests.harness import run_distributed
from train.checkpoint.commit import checkpoint_path
from train.config import CheckpointConfig

SAVED, STEPS = 3, 23
Layout = dict[str, Any]

ONE: Layout = {}
DATA: Layout = {"data_parallel_size": 2, "expert_parallel_size": 2}
DATA_4: Layout = {"data_parallel_size": 4, "expert_parallel_size": 4}
TENSOR: Layout = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
CONTEXT: Layout = {"context_parallel_size": 2}
COPIES: Layout = {"data_parallel_size": 2, "data_replicate_parallel_size": 2}
COPIES_EXPERTS = COPIES | {"expert_parallel_size": 2}
TENSOR_STAGES = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
TENSOR_CONTEXT = {"tensor_parallel_size": 2, "context_parallel_size": 2, "expert_parallel_size": 4}
DATA_TENSOR = {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2}
DATA_STAGES = DATA | {"pipeline_parallel_size": 2}

PAIRS = [
    (DATA, [DATA, ONE, TENSOR, CONTEXT]),
    (TENSOR_STAGES, [TENSOR_STAGES, DATA_4, COPIES]),
    (COPIES_EXPERTS, [COPIES_EXPERTS, DATA_TENSOR]),
    (TENSOR_CONTEXT, [TENSOR_CONTEXT, DATA_STAGES]),
]


def run(corpus: Path, run_dir: Path, layout: Layout) -> list[dict[str, Any]]:
    """Train to the end, from the checkpoint that is there, if there is one."""
    run_dir.mkdir(exist_ok=True)
    begun = (run_dir / "checkpoints").is_dir()
    rules = CheckpointConfig(every_steps=STEPS if begun else SAVED, keep_last=99)
    config = small_run(corpus, rules, steps=STEPS, layers=2, **layout)
    world = ParallelLayout.from_config(config.parallel).world_size
    assert run_distributed(train_here, world, config, run_dir, timeout=500.0) == [0] * world
    return records(run_dir)


def name(layout: Layout) -> str:
    short = [f"{key.removesuffix('_parallel_size')}{size}" for key, size in layout.items()]
    return "-".join(short) or "one"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("saved_by", "loaded_by"), PAIRS, ids=[name(pair[0]) for pair in PAIRS])
def test_the_losses_of_20_more_steps_in_any_layout(
    tiny_corpus: Path, tmp_path: Path, saved_by: Layout, loaded_by: list[Layout]
) -> None:
    wanted = run(tiny_corpus, tmp_path / "whole", saved_by)
    assert len(wanted) == STEPS
    for number, layout in enumerate(loaded_by):
        run_dir = tmp_path / str(number)
        source = checkpoint_path(tmp_path / "whole", SAVED)
        shutil.copytree(source, checkpoint_path(run_dir, SAVED))
        found = run(tiny_corpus, run_dir, layout)
        assert len(found) == STEPS - SAVED
        for ours, theirs in zip(found, wanted[SAVED:], strict=True):
            if layout == saved_by:
                assert ours == theirs
                continue
            assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
            for key in ("loss", "loss_main", "loss_mtp", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (name(layout), key)
