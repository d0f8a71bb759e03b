from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from parallel.config import EngramTableConfig
from tests.unit.train.model.tiny import FULL
from train.checkpoint.geometry import (
    Geometry,
    merge,
    read_geometry,
    recipe_geometry,
    write_geometry,
)
from train.checkpoint.geometry import differences as differences_in
from train.checkpoint.hashes import hash_of
from train.config import RunConfig
from train.model.config import EngramConfig
from train.model.engram import Engram
from train.model.transformer import Transformer

MEMORY = EngramConfig(layers=(0, 2), num_heads=2, rows_per_head=50, head_dim=8, seed=3)
CONFIG = RunConfig(name="tiny", model=replace(FULL, engram=MEMORY))


def on_host(config: RunConfig, **keys: Any) -> RunConfig:
    tables = replace(EngramTableConfig(storage="memory"), **keys)
    return replace(config, parallel=replace(config.parallel, engram=tables))


def engrams(config: RunConfig, ids: int = 40) -> dict[int, Engram]:
    """The memories of a model; pairs of its tokens are one for them, as far as `ids`."""
    found = Transformer(config.model).engram_layers()
    for engram in found.values():
        engram.hash.set_token_map(torch.arange(ids) // 2)
    return found


def geometry_of(config: RunConfig, engrams: dict[int, Engram]) -> Geometry:
    return recipe_geometry(config) | {"hash": hash_of(engrams)}


def of(config: RunConfig, ids: int = 40) -> Geometry:
    return geometry_of(config, engrams(config, ids))


def differences(saved: Geometry, config: RunConfig, now: Geometry) -> dict[str, str]:
    with TemporaryDirectory() as directory:
        write_geometry(Path(directory), saved)
        return differences_in(Path(directory), config, now)


def test_what_was_written_is_read_and_ranks_add_up(tmp_path: Path) -> None:
    config = on_host(CONFIG)
    whole, found = of(config), engrams(config)
    parts = [geometry_of(config, {layer: engram}) for layer, engram in found.items()]
    assert merge([geometry_of(config, {}), *parts]) == whole
    assert {"primes of layer 0", "multipliers of layer 2"} <= whole["hash"].keys()
    write_geometry(tmp_path, whole)
    saved = read_geometry(tmp_path)
    assert saved == whole
    assert differences(saved, config, whole) == {}
    # The launcher knows the keys only.
    assert differences(saved, config, recipe_geometry(config)) == {}
    assert read_geometry(tmp_path / "elsewhere") is None
    (tmp_path / "engram/geometry.json").write_text('{"recipe": {}}')
    with pytest.raises(ValueError, match=r"geometry.json: damaged: 'hash'"):
        read_geometry(tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"rows_per_head": 60},
            "model.engram.rows_per_head=60: the checkpoint's tables have 50; use "
            "model.engram.rows_per_head=50",
        ),
        ({"ngram_orders": (2, 3, 4)}, "model.engram.ngram_orders=[2,3,4]: the checkpoint's tables"),
        ({"num_heads": 4}, "model.engram.num_heads=4: the checkpoint's tables have 2"),
        ({"head_dim": 4}, "model.engram.head_dim=4: the checkpoint's tables have 8"),
        ({"seed": 4}, "model.engram.seed=4: the checkpoint's tables have 3"),
        ({"pad_token_id": 5}, "model.engram.pad_token_id=5: the checkpoint's tables have 2"),
        ({"layers": (0, 1)}, "model.engram.layers=[0,1]: the checkpoint's tables have [0,2]"),
    ],
)
def test_each_key_is_named(change: dict[str, Any], line: str) -> None:
    now = replace(CONFIG, model=replace(FULL, engram=replace(MEMORY, **change)))
    [(key, found)] = differences(of(on_host(CONFIG)), on_host(now), of(on_host(now))).items()
    assert key == f"model.engram.{next(iter(change))}"
    assert found.startswith(line)


def test_all_keys_are_named_at_once() -> None:
    config = on_host(CONFIG)
    optim = replace(CONFIG.optim, engram_optimizer="adagrad")
    memory = replace(MEMORY, seed=1, rows_per_head=9)
    now = on_host(replace(CONFIG, model=replace(FULL, engram=memory), optim=optim), dtype="bf16")
    assert list(differences(of(config), now, of(now))) == [
        *("model.engram.rows_per_head", "model.engram.seed"),
        *("parallel.engram.dtype", "optim.engram_optimizer"),
    ]


def test_the_tokenizer_and_the_numbers_themselves_are_compared() -> None:
    config = on_host(CONFIG)
    found = differences(of(config), config, of(config, ids=42))
    assert list(found) == [
        "compressed vocabulary of data.tokenizer, sha256",
        *("multipliers of layer 0", "multipliers of layer 2"),
    ]
    saved = of(config)
    saved["hash"]["primes of layer 2"][3] += 2
    assert list(differences(saved, config, of(config))) == ["primes of layer 2"]
    saved = of(config)
    saved["hash"]["token of images"] = 7
    [line] = differences(saved, config, of(config)).values()
    assert line == "token of images: null, and 7 in the checkpoint"


def test_where_tables_are_may_change_in_host_memory_only() -> None:
    config = on_host(CONFIG)
    moved = on_host(CONFIG, storage="mmap", path="/scratch", prefetch="off", huge_pages=False)
    assert differences(of(config), moved, of(moved)) == {}
    assert differences(of(config), CONFIG, of(CONFIG)) == {
        "parallel.engram.storage": "parallel.engram.storage=device: the checkpoint's tables are "
        "elsewhere; use memory, shared or mmap"
    }
    assert differences(of(CONFIG), moved, of(moved)) == {
        "parallel.engram.storage": "parallel.engram.storage=mmap: the checkpoint's tables are "
        "elsewhere; use device"
    }
