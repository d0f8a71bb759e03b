from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.config import DataConfig, SourceConfig
from train.config import OptimConfig, RunConfig
from train.model.config import EngramConfig, ModelConfig
from train.recipe import from_plain, load_resolved, save_resolved, to_plain

CONFIG = RunConfig(
    name="every kind of value",
    description="colons: quotes ' and \u00e9",
    model=ModelConfig(engram=EngramConfig(layers=(1, 3)), swiglu_limit=None),
    data=DataConfig(sources={"a": SourceConfig(path="1e3", weight=2)}),
    optim=OptimConfig(eps=1e-20, learning_rate=1e-3),
)


def test_a_recipe_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    save_resolved(CONFIG, path)
    assert load_resolved(path) == CONFIG
    save_resolved(replace(CONFIG, name="other"), path)
    assert load_resolved(path).name == "other"
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("train", "steps", "100"),
        ("train", "steps", 1.5),
        ("train", "stepz", 1),
        ("model", "residual", "none"),
        ("monitor", "wandb", 1),
    ],
)
def test_types_are_strict_and_unknown_keys_refused(part: str, key: str, value: object) -> None:
    plain = to_plain(CONFIG)
    plain[part][key] = value
    with pytest.raises(ValidationError):
        from_plain(plain)


@pytest.mark.parametrize("text", ["train: {steps: x}\nname: a\n", "- 1\n", "a: [\n", ""])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a resolved recipe"):
        load_resolved(path)
