from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from parallel.config import EngramTableConfig, ParallelConfig
from train.build import build
from train.config import OptimConfig, RunConfig, TrainConfig
from train.memory_rules import problems, tables_in_host_memory
from train.model.config import EngramConfig, ModelConfig

MEMORY = EngramConfig()


def recipe(
    tables: dict[str, Any], *, engram: EngramConfig | None = MEMORY, **keys: Any
) -> RunConfig:
    return RunConfig(
        name="memory",
        model=ModelConfig(engram=engram),
        parallel=ParallelConfig(engram=EngramTableConfig(**tables)),
        train=TrainConfig(dtype=keys.pop("dtype", "fp32")),
        optim=OptimConfig(**keys),
    )


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (recipe({}), []),
        (recipe({"storage": "memory"}), []),
        (recipe({"storage": "shared", "dtype": "fp8"}, dtype="bf16"), []),
        (recipe({"storage": "mmap", "path": "/local"}, engram_optimizer="adagrad"), []),
        (
            recipe(
                {"storage": "memory"},
                engram_optimizer="sinkhorn",
                optimizer="muon",
                table_optimizer="sinkhorn",
            ),
            [],
        ),
        # Switched off by one key.
        (recipe({"storage": "mmap"}, engram=None), []),
        (
            recipe({"storage": "mmap"}),
            [
                "parallel.engram.path=null: parallel.engram.storage=mmap needs a directory on a local "
                "drive; for example parallel.engram.path=/local_nvme"
            ],
        ),
        (
            recipe({"storage": "memory", "path": "/local"}),
            [
                "parallel.engram.path=/local: parallel.engram.storage=memory maps no files; use null, "
                "or parallel.engram.storage=mmap"
            ],
        ),
        (
            recipe({"storage": "memory", "dtype": "bf16"}, dtype="fp64"),
            [
                "parallel.engram.dtype=bf16: train.dtype=fp64 keeps rows in fp64; use fp32 (the "
                "master type), or train.dtype=fp32"
            ],
        ),
        (
            recipe({"storage": "memory"}, table_optimizer="sinkhorn"),
            [
                "optim.table_optimizer=sinkhorn: is to update engram (optim.tables), but "
                "parallel.engram.storage=memory leaves that to optim.engram_optimizer=adam; use "
                "optim.engram_optimizer=sinkhorn, or optim.tables=[embedding,head]"
            ],
        ),
        (
            recipe({"prefetch": "off"}, engram_optimizer="adagrad"),
            [
                "optim.engram_optimizer=adagrad: is that of tables in host memory; with "
                "parallel.engram.storage=device use adam and optim.table_optimizer, or "
                "parallel.engram.storage=memory, shared or mmap",
                "parallel.engram.storage=device: the other keys of parallel.engram are about rows in "
                "host memory; leave them out, or use memory, shared or mmap",
            ],
        ),
    ],
)
def test_rules(config: RunConfig, lines: list[str]) -> None:
    assert list(problems(config)) == lines


def test_tables_are_in_host_memory_if_the_model_has_some_and_the_recipe_says_so() -> None:
    assert tables_in_host_memory(recipe({"storage": "shared"}))
    assert not tables_in_host_memory(recipe({}))
    assert not tables_in_host_memory(recipe({"storage": "shared"}, engram=None))


def test_ranks_check_again_before_they_meet(
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(
        sources={"code": SourceConfig(path=str(tiny_corpus / "code"))},
        tokenizer=str(tiny_corpus / "tokenizer.json"),
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"parallel\.engram\.path=null"):
        build(replace(recipe({"storage": "mmap"}), data=data))
