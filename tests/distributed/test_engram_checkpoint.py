"""Runs whose Engram tables are in host memory: saved, resumed in any layout, refused, read again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import fingerprint
from parallel.config import EngramTableConfig
from tests.distributed import test_pipeline_checkpoint as runs
from tests.distributed.engram_runs import kinds
from tests.distributed.test_pipeline_checkpoint import (
    STEP,
    assert_same,
    contents,
    join,
    load_and_save,
    save_to,
    spread,
    stages,
    train_and_save,
)
from tests.harness import run_distributed
from train.build import Training
from train.checkpoint.commit import begin, checkpoint_path, commit, newest_checkpoint
from train.checkpoint.memories import read_memories
from train.checkpoint.state import Progress, write_meta
from train.config import CheckpointConfig, RunConfig
from train.evaluate import evaluate
from train.loop import open_batches, resume
from train.step import train_step

HOST = EngramTableConfig(storage="memory")


def on(corpus: Path, host: EngramTableConfig = HOST, **parallel: Any) -> RunConfig:
    """Memory in the second and third of four layers."""
    config = runs.on(corpus, engram=host, **parallel)
    assert config.model.engram is not None
    memory = replace(config.model.engram, layers=(1, 2), rows_per_head=300)
    return replace(config, model=replace(config.model, engram=memory))


def rows_of(rank: int, config: RunConfig, run_dir: Path) -> dict[str, bytes]:
    """Every array of the tables of a run, loaded by one rank."""
    training = join(config)
    resume(training, run_dir, fingerprint(config.data))
    assert training.memory is not None
    return {
        name: array.tobytes()
        for name, array in training.memory.service.submit(lambda store: store.arrays)
        .result()
        .items()
    }


@pytest.fixture(scope="module")
def saved(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint of stages in a V, and the loss of the step after it."""
    run_dir = tmp_path_factory.mktemp("runs") / "v"
    return run_dir, spread(train_and_save, on(tiny_corpus, **stages("zbv")), run_dir)


def test_any_layout_goes_on_with_the_tables_that_a_pipeline_saved(
    tiny_corpus: Path, tmp_path: Path, saved: tuple[Path, float]
) -> None:
    one_rank = on(tiny_corpus)
    [wanted] = run_distributed(rows_of, 1, one_rank, saved[0])
    assert any(wanted["rows"])
    for number, parallel in enumerate([stages("1f1b", pipeline_layers=(2, 2))]):
        target = tmp_path / str(number)
        loss = spread(load_and_save, on(tiny_corpus, **parallel), saved[0], target)
        assert loss == pytest.approx(saved[1], rel=1e-6)
        assert run_distributed(rows_of, 1, one_rank, target) == [wanted]
        assert_same(contents(target), contents(saved[0]))


OPTIMIZERS: list[Any] = ["adam", "adagrad", "sinkhorn"]


def resumed(rank: int, config: RunConfig, run_dir: Path) -> None:
    training = join(config)
    resume(training, run_dir, fingerprint(config.data))


def refused(rank: int, config: RunConfig, run_dir: Path, lines: list[str]) -> None:
    """On every rank, and before a tensor or a row is read: there is none."""
    with pytest.raises(ValueError, match=r"model|checkpoint") as error:
        resumed(rank, config, run_dir)
    assert str(error.value).splitlines() == lines


def without_numbers(run_dir: Path, target: Path) -> Path:
    """A copy of the newest checkpoint of a run in which there is nothing to be read."""
    newest = newest_checkpoint(run_dir)
    assert newest
    copy = checkpoint_path(target, newest[0])
    (copy / "engram").mkdir(parents=True)
    for name in ("checkpoint.json", "engram/geometry.json"):
        (copy / name).write_bytes((newest[1] / name).read_bytes())
    return target


def with_memory(config: RunConfig, **keys: Any) -> RunConfig:
    assert config.model.engram is not None
    memory = replace(config.model.engram, **keys)
    return replace(config, model=replace(config.model, engram=memory))


FRESH = CheckpointConfig(unfit_tables="fresh")


def test_other_tables_are_refused_before_anything_is_read(
    tiny_corpus: Path, tmp_path: Path, saved: tuple[Path, float]
) -> None:
    run_dir = without_numbers(saved[0], tmp_path)
    config = on(tiny_corpus, data_parallel_size=2)
    changed = with_memory(config, seed=1, rows_per_head=200)
    lines = [
        "model.engram.rows_per_head=200: the checkpoint's tables have 300; use "
        "model.engram.rows_per_head=300",
        "model.engram.seed=1: the checkpoint's tables have 0; use model.engram.seed=0",
        "or keep everything else and start the tables at zero:",
        f"  mneme resume {run_dir} model.engram.rows_per_head=200 model.engram.seed=1 "
        "checkpoint.unfit_tables=fresh",
    ]
    run_distributed(refused, 2, changed, run_dir, lines)
    reshaped = replace(with_memory(config, head_dim=4), checkpoint=FRESH)
    lines = [
        "model.engram.head_dim=4: the checkpoint's tables have 8; use model.engram.head_dim=8",
        "or start a new run: other parameters of the model have other shapes, too",
    ]
    run_distributed(refused, 2, reshaped, run_dir, lines)
    lines = [
        "parallel.engram.storage=device: the checkpoint's tables are elsewhere; use memory, shared "
        "or mmap",
        "or start a new run: tables on the device cannot start fresh in this one",
    ]
    on_device = replace(on(tiny_corpus, EngramTableConfig()), checkpoint=FRESH)
    run_distributed(refused, 1, on_device, run_dir, lines)


def only_weights(rank: int, config: RunConfig, run_dir: Path) -> None:
    """A checkpoint that was imported, of a model whose tables nobody had."""
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    training = join(config)
    state = training.engine.state(only_weights=True)
    state |= {f"buffer.{name}": value for name, value in training.model.named_buffers()}
    temporary = begin(run_dir, 0)
    save(state, checkpoint_id=temporary)
    write_meta(temporary, step=0, tokens=0, corpus="", world_size=0, only_weights=True)
    path = commit(temporary)
    command = f"  mneme resume {run_dir} checkpoint.unfit_tables=fresh"
    advice = "or keep everything else and start the tables at zero:"
    with pytest.raises(ValueError, match="holds no Engram tables") as error:
        resume(training, run_dir, "")
    assert str(error.value).splitlines() == [f"{path}: holds no Engram tables", advice, command]
    training = join(replace(config, checkpoint=FRESH))
    assert resume(training, run_dir, "").step == 0


def test_weights_without_tables_are_refused_unless_fresh_ones_are_wanted(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    run_distributed(only_weights, 1, on(tiny_corpus), tmp_path)


def tables_of(training: Training) -> dict[str, np.ndarray[Any, Any]]:
    assert training.memory is not None
    return training.memory.service.submit(lambda store: dict(store.arrays)).result()


def starts_fresh(rank: int, config: RunConfig, run_dir: Path) -> None:
    """Everything but the tables goes on; from the next checkpoint on they do, too."""
    corpus = fingerprint(config.data)
    kept = {name: value.clone() for name, value in parameters(config, run_dir).items()}
    changed = replace(with_memory(config, rows_per_head=200), checkpoint=FRESH)
    training = join(changed)
    progress = resume(training, run_dir, corpus)
    assert training.tables
    assert [line.partition("=")[0] for line in training.tables.fresh_because] == [
        "model.engram.rows_per_head"
    ]
    assert not any(array.any() for array in tables_of(training).values())
    found = dict(training.model.named_parameters())
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], value) for name, value in kept.items())

    batches = open_batches(training, progress)
    _, batch, data_state = next(batches)
    train_step(training, batch, STEP + 1)
    save_to(training, run_dir, Progress(step=STEP + 1, tokens=9, data_state=data_state))
    assert tables_of(training)["rows"].any()
    again = join(changed)
    assert resume(again, run_dir, corpus).step == STEP + 1
    assert again.tables
    assert again.tables.fresh_because == []
    for name, array in tables_of(again).items():
        assert np.array_equal(array, tables_of(training)[name])


def parameters(config: RunConfig, run_dir: Path) -> dict[str, torch.Tensor]:
    training = join(config)
    resume(training, run_dir, fingerprint(config.data))
    return dict(training.model.named_parameters())


def test_fresh_tables_keep_the_backbone(tiny_corpus: Path, tmp_path: Path) -> None:
    config = on(tiny_corpus)
    spread(train_and_save, config, tmp_path)
    run_distributed(starts_fresh, 1, config, tmp_path)


def evaluated(rank: int, config: RunConfig, run_dir: Path) -> None:
    """The loss is the same whether rows come from the service or out of the checkpoint's files."""
    training = join(config)
    resume(training, run_dir, fingerprint(config.data))
    wanted = evaluate(training)
    newest = newest_checkpoint(run_dir)
    assert newest
    engrams = training.model.engram_layers()
    for engram in engrams.values():
        engram.lookup = None
    read_memories(newest[1], engrams)
    training = replace(training, memory=None)
    assert evaluate(training) == wanted
    for engram in engrams.values():
        engram.lookup = lambda tokens: torch.zeros(*tokens.input_ids.shape, 8, 8)
    assert evaluate(training) != wanted
    next(iter(engrams.values())).hash.set_token_map(torch.arange(512))
    with pytest.raises(ValueError, match="compressed vocabulary of data"):
        read_memories(newest[1], engrams)


def test_evaluation_reads_the_same_tables(tiny_corpus: Path, saved: tuple[Path, float]) -> None:
    run_distributed(evaluated, 1, on(tiny_corpus), saved[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
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
    loss = spread(train_and_save, configured(**stages("1f1b")), first)
    wanted = run_distributed(rows_of, 1, configured(), first)
    assert any(wanted[0]["rows"])
    for number, parallel in enumerate(
        [
            {"host": mapped, "data_parallel_size": 2},
            {"host": EngramTableConfig(storage="shared"), "context_parallel_size": 2},
            stages("1f1b", pipeline_layers=(2, 2), data_parallel_size=2),
            stages("zbv"),
        ]
    ):
        target = tmp_path / str(number)
        found = spread(load_and_save, configured(**parallel), first, target)
        assert found == pytest.approx(loss, rel=1e-6 if dtype == "fp32" else 1e-3)
        assert run_distributed(rows_of, 1, configured(), target) == wanted


def test_the_last_step_leaves_no_scratch_behind(saved: tuple[Path, float]) -> None:
    newest = newest_checkpoint(saved[0])
    assert newest
    assert kinds(newest[1]) == [("save", STEP)]
    assert {path.suffix for path in (newest[1] / "engram").iterdir()} == {".json", ".safetensors"}
    assert json.loads((newest[1] / "engram/geometry.json").read_text())["recipe"]
