"""Runs whose Engram tables are in host memory: saved, resumed in any layout, refused, read again."""

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from data.loader import fingerprint
from parallel.config import EngramTableConfig
from tests.distributed.engram_runs import kinds
from tests.distributed.test_pipeline_checkpoint import (
    STEP,
    join,
    load_and_save,
    save_to,
    spread,
    stages,
    train_and_save,
)
from tests.harness import run_distributed
from tests.parity.test_engram_prefetch import recipe
from train.checkpoint.commit import begin, checkpoint_path, commit, newest_checkpoint
from train.checkpoint.manifest import seal
from train.checkpoint.memories import read_memories
from train.checkpoint.state import Progress, write_meta
from train.config import CheckpointConfig, RunConfig
from train.evaluate import evaluate
from train.loop import open_batches, resume
from train.step import train_step
from train.training import Training

HOST = EngramTableConfig(storage="memory")
FRESH = CheckpointConfig(unfit_tables="fresh")


def on(corpus: Path, host: EngramTableConfig = HOST, **parallel: Any) -> RunConfig:
    """Two layers, both with memory."""
    config = recipe(corpus, 4, engram=host, **parallel)
    micro = 2 // parallel.get("data_parallel_size", 1)
    return replace(
        config,
        evaluate=replace(config.evaluate, num_sequences=4),
        train=replace(config.train, micro_batch_size=micro),
    )


def with_memory(config: RunConfig, **keys: Any) -> RunConfig:
    assert config.model.engram is not None
    memory = replace(config.model.engram, **keys)
    return replace(config, model=replace(config.model, engram=memory))


def resumed(config: RunConfig, run_dir: Path) -> tuple[Training, Progress]:
    training = join(config)
    return training, resume(training, run_dir, fingerprint(config.data))


def arrays_of(training: Training) -> dict[str, NDArray[Any]]:
    """Rows and states of this rank."""
    assert training.memory is not None
    return training.memory.service.submit(lambda store: dict(store.arrays)).result()


def rows_of(rank: int, config: RunConfig, run_dir: Path) -> dict[str, bytes]:
    """Every array of the tables of a run, loaded by one rank."""
    return {name: array.tobytes() for name, array in arrays_of(resumed(config, run_dir)[0]).items()}


def train_in_pipeline(rank: int, config: RunConfig, run_dir: Path) -> tuple[float, Any]:
    """Save after two steps; the loss of the third, and the live tables as they were saved."""
    training = join(config)
    batches = open_batches(training, Progress(step=0, tokens=0, data_state={}))
    for step in range(1, STEP + 1):
        _, batch, data_state = next(batches)
        train_step(training, batch, step)
    save_to(training, run_dir, Progress(step=STEP, tokens=9, data_state=data_state))
    live = {name: array.copy() for name, array in arrays_of(training).items()}
    return train_step(training, next(batches)[1], STEP + 1)["loss"], live


@pytest.fixture(scope="module")
def saved(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, Any]:
    """A run of two stages with a memory each: its checkpoint, and what `train_in_pipeline` gives."""
    run_dir = tmp_path_factory.mktemp("runs") / "pipeline"
    config = on(tiny_corpus, **stages("1f1b"))
    (loss, one), (_, other) = run_distributed(train_in_pipeline, 2, config, run_dir)
    return run_dir, loss, {name: np.concatenate([one[name], other[name]]) for name in one}


def goes_on(rank: int, config: RunConfig, run_dir: Path, loss: float, live: Any) -> None:
    training, progress = resumed(config, run_dir)
    found = arrays_of(training)
    assert found.keys() == live.keys() == {"rows", "exp_avg", "exp_avg_sq", "num_updates"}
    for name, array in found.items():
        assert np.array_equal(array, live[name]), name
        assert array.any()
    reads_the_files(training, run_dir)
    batch = next(open_batches(training, progress))[1]
    assert train_step(training, batch, STEP + 1)["loss"] == pytest.approx(loss, rel=1e-6)


def reads_the_files(training: Training, run_dir: Path) -> None:
    """The loss is the same whether rows come from the service or out of the checkpoint's files."""
    wanted = evaluate(training)
    newest = newest_checkpoint(run_dir)
    assert newest
    engrams = training.model.engram_layers()
    lookups = {layer: engram.lookup for layer, engram in engrams.items()}
    read_memories(newest[1], engrams)
    alone = replace(training, memory=None)
    assert evaluate(alone) == wanted
    for engram in engrams.values():
        engram.lookup = lambda tokens: torch.zeros(*tokens.input_ids.shape, 8, 4)
    assert evaluate(alone) != wanted
    for layer, engram in engrams.items():
        engram.lookup = lookups[layer]
    other = deepcopy(engrams[0])
    other.hash.set_token_map(torch.arange(512))
    with pytest.raises(ValueError, match=r"^compressed vocabulary of data"):
        read_memories(newest[1], {0: other})


def test_one_rank_goes_on_with_what_two_stages_saved(
    tiny_corpus: Path, saved: tuple[Path, float, Any]
) -> None:
    run_distributed(goes_on, 1, on(tiny_corpus), *saved)
    newest = newest_checkpoint(saved[0])
    assert newest
    assert kinds(newest[1]) == [("save", STEP)]
    assert not list((saved[0] / "checkpoints").glob("*.tmp"))


def refuses(config: RunConfig, run_dir: Path, lines: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model|checkpoint") as error:
        resumed(config, run_dir)
    assert str(error.value).splitlines() == lines


def refuses_all(rank: int, config: RunConfig, run_dir: Path) -> None:
    changed = with_memory(config, seed=1, rows_per_head=40)
    lines = [
        "model.engram.rows_per_head=40: the checkpoint's tables have 50; use "
        "model.engram.rows_per_head=50",
        "model.engram.seed=1: the checkpoint's tables have 0; use model.engram.seed=0",
        "or keep everything else and start the tables at zero:",
        f"  mneme resume {run_dir} model.engram.rows_per_head=40 model.engram.seed=1 "
        "checkpoint.unfit_tables=fresh",
    ]
    refuses(changed, run_dir, lines)
    reshaped = replace(with_memory(config, head_dim=8), checkpoint=FRESH)
    lines = [
        "model.engram.head_dim=8: the checkpoint's tables have 4; use model.engram.head_dim=4",
        "or start a new run: other parameters of the model have other shapes, too",
    ]
    refuses(reshaped, run_dir, lines)
    lines = [
        "parallel.engram.storage=device: the checkpoint's tables are elsewhere; use memory, shared "
        "or mmap",
        "or start a new run: tables on the device cannot start fresh in this one",
    ]
    device = replace(config.parallel, engram=EngramTableConfig())
    refuses(replace(config, parallel=device, checkpoint=FRESH), run_dir, lines)


def test_other_tables_are_refused_on_all_ranks_before_anything_is_read(
    tiny_corpus: Path, tmp_path: Path, saved: tuple[Path, float, Any]
) -> None:
    """There is nothing in the checkpoint that could be read."""
    newest = newest_checkpoint(saved[0])
    assert newest
    copy = checkpoint_path(tmp_path, newest[0])
    (copy / "engram").mkdir(parents=True)
    for name in ("checkpoint.json", "engram/geometry.json"):
        (copy / name).write_bytes((newest[1] / name).read_bytes())
    seal(copy)
    run_distributed(refuses_all, 2, on(tiny_corpus, data_parallel_size=2), tmp_path)


def starts_fresh(rank: int, config: RunConfig, run_dir: Path) -> None:
    """Everything but the tables goes on; from the next checkpoint on they do, too."""
    kept = {name: value.clone() for name, value in parameters_of(resumed(config, run_dir)[0])}
    changed = replace(with_memory(config, rows_per_head=40), checkpoint=FRESH)
    training, progress = resumed(changed, run_dir)
    assert training.tables
    [line] = training.tables.fresh_because
    assert line.startswith("model.engram.rows_per_head=40")
    assert not any(array.any() for array in arrays_of(training).values())
    found = dict(parameters_of(training))
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], value) for name, value in kept.items())

    _, batch, data_state = next(open_batches(training, progress))
    train_step(training, batch, STEP + 1)
    save_to(training, run_dir, Progress(step=STEP + 1, tokens=9, data_state=data_state))
    again, progress = resumed(changed, run_dir)
    assert progress.step == STEP + 1
    assert again.tables
    assert again.tables.fresh_because == []
    for name, array in arrays_of(again).items():
        assert array.any()
        assert np.array_equal(array, arrays_of(training)[name])


def parameters_of(training: Training) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.full_tensor()) for name, value in training.model.named_parameters()]  # type: ignore[attr-defined]


def test_fresh_tables_keep_the_backbone(
    tiny_corpus: Path, tmp_path: Path, saved: tuple[Path, float, Any]
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    run_distributed(starts_fresh, 1, on(tiny_corpus), tmp_path)


def only_weights(rank: int, config: RunConfig, run_dir: Path) -> None:
    """A checkpoint that was imported, of a model whose tables nobody had."""
    training = join(config)
    state = training.engine.state(only_weights=True)
    state |= {f"buffer.{name}": value for name, value in training.model.named_buffers()}
    temporary = begin(run_dir, 0)
    save_distributed(state, checkpoint_id=temporary)
    write_meta(temporary, step=0, tokens=0, corpus="", world_size=0, only_weights=True)
    lines = [
        f"{commit(temporary)}/engram/geometry.json: missing; the checkpoint knows of no Engram tables",
        "or keep everything else and start the tables at zero:",
        f"  mneme resume {run_dir} checkpoint.unfit_tables=fresh",
    ]
    refuses(config, run_dir, lines)
    assert resumed(replace(config, checkpoint=FRESH), run_dir)[1].step == 0


def test_weights_without_tables_are_refused_unless_fresh_ones_are_wanted(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    run_distributed(only_weights, 1, on(tiny_corpus), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adam", "fp32"), ("sinkhorn", "bf16"), ("adagrad", "fp8")]
)
def test_every_format_and_optimizer_in_any_layout_and_storage(
    tiny_corpus: Path, tmp_path: Path, optimizer: Any, dtype: Any
) -> None:
    def configured(**parallel: Any) -> RunConfig:
        host = replace(parallel.pop("host", HOST), dtype=dtype)
        config = on(tiny_corpus, host, **parallel)
        return replace(config, optim=replace(config.optim, engram_optimizer=optimizer))

    (tmp_path / "nvme").mkdir()
    mapped = EngramTableConfig(storage="mmap", path=str(tmp_path / "nvme"))
    first = tmp_path / "first"
    loss = spread(train_and_save, configured(data_parallel_size=2), first)
    wanted = run_distributed(rows_of, 1, configured(), first)
    assert any(wanted[0]["rows"])
    for number, parallel in enumerate(
        [
            {"host": mapped, "data_parallel_size": 2},
            {"host": EngramTableConfig(storage="shared"), "context_parallel_size": 2},
            stages("1f1b", data_parallel_size=2),
        ]
    ):
        target = tmp_path / str(number)
        found = spread(load_and_save, configured(**parallel), first, target)
        assert found == pytest.approx(loss, rel=1e-6 if dtype == "fp32" else 1e-3)
        assert run_distributed(rows_of, 1, configured(), target) == wanted
