import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.catalog import options
from launch.compose import Recipe, RecipeError, change, compose
from train.config import RunConfig


def problems(recipe: str, *overrides: str, nproc: int | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        compose(recipe, overrides, nproc=nproc)
    return caught.value.problems


@pytest.mark.parametrize("name", options("experiment"))
def test_every_packaged_recipe_composes(name: str) -> None:
    recipe = compose(name)
    assert recipe.config.name == name
    assert recipe.config.description


def test_groups_overrides_and_types_arrive() -> None:
    overrides = ["train.steps=30", "+model.hidden_size=64", "model.engram.num_heads=8"]
    recipe = compose("v4_nano", overrides)
    assert isinstance(recipe, Recipe)
    assert recipe.overrides == overrides
    assert (recipe.config.train.steps, recipe.config.model.hidden_size) == (30, 64)
    engram = recipe.config.model.engram
    assert engram is not None
    assert (engram.num_heads, engram.layers, engram.head_dim) == (8, (1,), 16)
    assert recipe.config.parallel.data_parallel_size == 4


def test_a_part_is_switched_off_and_on_again() -> None:
    assert compose("v4_nano", ["model.engram=null"]).config.model.engram is None
    back = compose("v4_nano", ["model.engram=null", "model.engram={}", "model.engram.seed=3"])
    assert back.config.model.engram is not None
    assert back.config.model.engram.seed == 3


def test_the_seeing_model_is_the_text_model_with_vision() -> None:
    seeing = compose("v4_nano", ["model=v4_nano_mm"]).config.model
    text = compose("v4_nano").config.model
    assert seeing.vision is not None
    assert seeing.vision.encoder is not None
    assert replace(seeing, vision=None) == text
    assert text.vision is None


def test_a_key_below_a_null_says_how_to_switch_it_on() -> None:
    [problem] = problems("v4_nano", "model.engram=null", "model.engram.num_heads=8")
    assert problem == (
        "model.engram.num_heads=8: model.engram is null in this recipe; switch it on with "
        "'model.engram={}' before it, or with 'model.engram={num_heads:8}'"
    )
    compose("v4_nano", ["model.engram=null", "model.engram={num_heads:8}"])


def test_all_mistakes_are_reported_at_once() -> None:
    found = problems(
        "v4_nano",
        "model.hiden_size=3",
        "learning_rate=3",
        "+new=1",
        "model=nope",
        "train.steps",
        "train.steps=1,2",
        "~train.steps",
        "model.residual=mhcc",
        "train.seed=abc",
        "train.micro_batch_size=2.5",
        "monitor.wandb=5",
        "model.mla=4",
        "data.sources.docs.path=3",
    )
    expected = [
        "model.hiden_size=3: no such key; nearest: model.hidden_size",
        "learning_rate=3: no such key; nearest: optim.learning_rate",
        "+new=1: no such key; a recipe has name, description, model,",
        "train.steps: not an override; type train.steps=VALUE",
        "train.steps=1,2: one value, not several;",
        "~train.steps: cannot be removed; type train.steps=VALUE",
        "model=nope: no such file under recipes/model; use engram_27b,",
        "model.mla=4: must be a mapping; has the keys q_lora_rank,",
        "model.residual=mhcc: must be one of plain, hc, mhc, mhc_single_pass; use model.residual=mhc",
        "data.sources.docs.path=3: must be text",
        "train.seed=abc: must be a whole number; for example train.seed=0",
        "train.micro_batch_size=2.5: must be a whole number; for example",
        "monitor.wandb=5: must be true or false; for example monitor.wandb=true",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert any(problem.startswith(start) for problem in found), start


def test_stages_are_a_list_of_mappings_whose_mistakes_are_found_in_place() -> None:
    config = compose("v4_nano", ["train.stages=[{steps:40,sequence_length:64},{}]"]).config
    assert [stage.steps for stage in config.train.stages] == [40, None]
    assert problems("v4_nano", "train.stages=[{steps:40,lenght:3},{steps:x}]") == [
        "train.stages[0].lenght=3: no such key; train.stages[0] has steps, sequence_length, "
        "global_batch_size, micro_batch_size, learning_rate, indexer_stage",
        "train.stages[1].steps=x: must be a whole number; for example train.stages=[]",
    ]


def test_a_missing_key_is_reported_and_its_part_left_out() -> None:
    found = problems("v4_nano", "train.batch_size_ramp={start:4,increment:4}", "train.seed=x")
    assert sorted(found) == [
        "train.batch_size_ramp.samples: missing; type train.batch_size_ramp.samples=VALUE",
        "train.seed=x: must be a whole number; for example train.seed=0",
    ]


def test_rules_across_parts_are_reported_beside_wrong_keys() -> None:
    found = problems("v4_nano", "model.hiden_size=3", "model.mtp_depth=2", nproc=8)
    assert [problem.split(":")[0] for problem in found[:2]] == [
        "model.hiden_size=3",
        "model.mtp_depth=2",
    ]
    assert found[2] == (
        "world size = data x data_replicate x tensor x pipeline x context = 4, but --nproc 8; "
        "use --nproc 4 or parallel.data_parallel_size=8"
    )


def test_rules_are_reported_beside_wrong_types_and_ranges_unless_they_follow_from_them() -> None:
    found = problems(
        "v4_nano",
        "train.steps=many",
        "optim.warmup_steps=1000",
        "train.micro_batch_size=0",
        "train.global_batch_size=18",
        "parallel.expert_parallel_size=3",
        "data.sources.x.weight=2",
        "model.mtp_depth=2",
    )
    assert [problem.split(":")[0] for problem in found] == [
        "data.sources.x.path",
        "train.steps=many",
        "train.micro_batch_size=0",
        "parallel.expert_parallel_size=3",
        "model.mtp_depth=2",
        "train.global_batch_size=18",
    ]


def test_products_of_axes_are_not_judged_with_a_wrong_axis() -> None:
    wrong = ("parallel.data_parallel_size=two", "parallel.expert_parallel_size=3")
    found = problems("v4_nano", *wrong, "parallel.tensor_parallel_size=8", nproc=8)
    assert [problem.split(":")[0] for problem in found] == [
        "parallel.data_parallel_size=two",
        "parallel.tensor_parallel_size=8",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.engram={num_heads: 8", "not readable as KEY=VALUE"),
        ("a b=3", "not readable as KEY=VALUE"),
        (
            "data=null",
            "names a file under recipes/data; type data=NAME with one of niah, pretraining, "
            "quickstart, quickstart_mm",
        ),
        ("~model", "names a file under recipes/model"),
        ("~data.sources.x", "no such entry to remove; data.sources has code, docs"),
        ("train=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("data.sources.x.weight=2", "missing; type data.sources.x.path=VALUE"),
        ("model.engram.layers=[a]", "must be a whole number"),
        ("train.steps=???", "missing; type train.steps=VALUE"),
    ],
)
def test_one_mistake(override: str, said: str) -> None:
    [problem] = problems("v4_nano", override)
    assert said in problem


def test_entries_are_removed_and_added() -> None:
    added = ["~data.sources.docs", "data.sources.own.path=here", "data.sources.own.weight=3"]
    sources = compose("v4_nano", added).config.data.sources
    assert {name: source.weight for name, source in sources.items()} == {"code": 1, "own": 3}


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert problems("v4_nan") == [
        "v4_nan: no such recipe; nearest: v4_nano, v3_nano, v4_nano_mm; or give a path to a .yaml"
    ]
    assert problems("./v4_nano.yaml")[0].startswith("./v4_nano.yaml: no such file")


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_users_file_builds_on_a_recipe_and_on_groups_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "model/wide.yaml", "hidden_size: 256\n")
    mine = write(
        tmp_path / "v4_nano.yaml",  # even under the name of a packaged one
        "defaults:\n  - v4_nano\n  - override /model: wide\n"
        "train: {steps: 40}\noptim: {warmup_steps: '${model.mtp_depth}'}\n",
    )
    config = compose(mine).config
    assert (config.name, config.train.steps) == ("v4_nano", 40)
    assert (config.model.hidden_size, config.optim.warmup_steps) == (256, 0)
    assert config.parallel.data_parallel_size == 4
    narrow = compose(mine, ["model=v4_nano", "train.steps=50"]).config
    assert (narrow.model.hidden_size, narrow.train.steps) == (128, 50)


def test_another_recipe_can_be_put_on_top(tmp_path: Path) -> None:
    write(tmp_path / "experiment/short.yaml", "# @package _global_\ntrain: {steps: 21}\n")
    mine = write(tmp_path / "mine.yaml", "defaults: [v4_nano]\n")
    config = compose(mine, ["experiment=short"]).config
    assert (config.name, config.train.steps) == ("mine", 21)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  steps: 3\n steps: 4\n", "mine.yaml:3: expected <block end>"),
        ("train: {}\ntrain: {}\n", "mine.yaml:2: found duplicate key train; not valid YAML"),
        ("- 1\n", "mine.yaml: must be a mapping"),
        ("defaults: [v4_nan]\n", "defaults: experiment/v4_nan does not exist; use v4_nano"),
        ("defaults: [{override /model: nope}]\n", "model/nope does not exist; use engram_27b,"),
        ("defaults: [{override /model: no}]\n", "mine.yaml: Unsupported item value in defaults"),
        ("model: {engram: [1]}\n", "model.engram=[1]: must be a mapping; has the keys layers,"),
        ("data:\n  sources: [code]\n", "write data.sources.NAME.KEY=VALUE (mine.yaml:2)"),
        ("model: {engram: {layers: {a: 1}}}\n", "must be a list; for example model.engram.layers"),
        ("defaults: [v4_nano]\ntrain:\n  lr: 1\n", "train.lr=1: no such key; train has steps"),
        ("defaults: [v4_nano]\ntrain:\n  lr: 1\n", "(mine.yaml:3)"),
        ("defaults: [v4_nano]\nmodel:\n  mla:\n    qk_rope_head_dim: 3\n", "(mine.yaml:4)"),
        ("defaults: [v4_nano]\ntrain:\n  steps: ${no.where}\n", "(mine.yaml:3)"),
    ],
)
def test_mistakes_in_a_users_file_name_the_place(tmp_path: Path, text: str, said: str) -> None:
    [problem] = problems(write(tmp_path / "mine.yaml", text))
    assert said in problem


def test_a_resolved_recipe_changes_only_where_it_may() -> None:
    config = compose("v4_nano").config
    changed = change(
        config, ["train.steps=200", "parallel.expert_parallel_size=4"], ["train.steps", "parallel"]
    )
    assert (changed.train.steps, changed.parallel.expert_parallel_size) == (200, 4)
    with pytest.raises(RecipeError) as caught:
        change(config, ["train.seed=1", "train.steps=x", "train.stepz=1"], ["train.steps"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "train.stepz=1",
        "train.seed=1",
        "train.steps=x",
    ]
    assert "start a new run, or change train.steps" in caught.value.problems[1]


def test_composing_needs_no_torch() -> None:
    code = "import sys; from launch.compose import compose; compose('v4_nano'); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False
        ).returncode
        == 0
    )


def test_the_result_is_the_schema_itself() -> None:
    assert type(compose("v4_nano").config) is RunConfig
