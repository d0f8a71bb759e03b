"""What surrounds the weights: tokenizer, names, and what may change before training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.checkpoint import export_hf, import_hf
from launch.cli import main
from launch.compose import RecipeError
from launch.start import resume
from tests.unit.train.checkpoint.runs import exported, imported, noisy, write_run
from tests.unit.train.model.tiny import TINY
from train.config import RunConfig, StageConfig
from train.recipe import load_resolved, save_resolved

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
MODEL = replace(TINY, residual="plain", swiglu_limit=None, vocab_size=512)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the corpus of a quick start, whose tokenizer the recipe names."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", noisy(MODEL))


def test_the_tokenizer_goes_with_the_weights(tiny_corpus: Path, run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    config = load_resolved(run / "recipe.yaml")
    data = replace(config.data, tokenizer=str(tiny_corpus / "tokenizer.json"))
    save_resolved(replace(config, data=data), run / "recipe.yaml")
    folder = exported(run, tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def square(x):\n    return x * x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 0)
    found = json.loads((folder / "config.json").read_text())
    assert [found[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None, 0, 1]

    back = imported(folder, tmp_path / "back")
    kept = load_resolved(back / "recipe.yaml").data.tokenizer
    assert kept == str(tmp_path / "back" / "tokenizer.json")
    assert Path(kept).read_bytes() == (tiny_corpus / "tokenizer.json").read_bytes()


def test_without_a_tokenizer_no_token_is_special(run: Path, tmp_path: Path) -> None:
    found = json.loads((exported(run, tmp_path / "folder") / "config.json").read_text())
    assert [found[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None, None, None]


def test_a_run_or_one_of_its_checkpoints_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoints" / "step-00000003"
    for name, source in (("one", run), ("other", checkpoint)):
        assert main(["checkpoint", "export-hf", str(source), str(tmp_path / name)]) == 0
    assert "step-00000003 as deepseek_v3" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "one").iterdir()]
    assert sorted(files) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    wider = RunConfig(name="wider", model=replace(MODEL, intermediate_size=56))
    save_resolved(wider, run / "recipe.yaml")
    with pytest.raises(ValueError, match=r"does not hold the model .* 3 tensors") as error:
        export_hf(run, tmp_path / "folder", dtype=None, max_shard_size="5GB")
    assert "model.layers.0.ffn.gate.weight[56, 32]" in str(error.value)
    assert not (tmp_path / "folder").exists()


def test_the_stage_that_was_reached_decides_what_is_exported(tmp_path: Path) -> None:
    indexer = replace(MODEL.indexer, head_dim=8)
    run = write_run(tmp_path / "run", noisy(replace(MODEL, attention="dsa", indexer=indexer)))
    config = load_resolved(run / "recipe.yaml")  # its checkpoint is of step 3
    for warmup_steps in (2, 3):
        stages = (
            StageConfig(steps=warmup_steps, indexer_stage="dense_warmup", sequence_length=64),
            StageConfig(indexer_stage="sparse", sequence_length=128),
        )
        train = replace(config.train, stages=stages)
        save_resolved(replace(config, train=train), run / "recipe.yaml")
        folder = tmp_path / str(warmup_steps)
        if warmup_steps == 2:
            found = json.loads((exported(run, folder) / "config.json").read_text())
            assert found["max_position_embeddings"] == 128
        else:
            with pytest.raises(ValueError, match=r'model.indexer.stage="dense_warmup": deepseek_'):
                exported(run, folder)


def test_before_training_all_but_the_model_may_change(run: Path, tmp_path: Path) -> None:
    back = imported(exported(run, tmp_path / "folder"), tmp_path / "back")
    assert main(["status", str(back)]) == 0
    with pytest.raises(RecipeError, match=r"^data.sources=\{\}: nothing to train on"):
        resume(back, ["optim.learning_rate=1e-5", "train.seed=3"])
    with pytest.raises(RecipeError, match=r"model.hidden_size=8: cannot change"):
        resume(back, ["model.hidden_size=8"])
    with pytest.raises(RecipeError, match=r"optim.learning_rate=1e-5: cannot change"):
        resume(run, ["optim.learning_rate=1e-5"])


def test_a_recipe_that_cannot_train_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    wrong = ["parallel.expert_parallel_size=3"]
    with pytest.raises(RecipeError, match="expert_parallel_size=3"):
        import_hf(folder, tmp_path / "back", recipe="v4_nano", overrides=wrong)
    assert not (tmp_path / "back").exists()
