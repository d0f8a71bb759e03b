import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from launch.corpus import corpus_problems
from train.config import EvaluateConfig, RunConfig


@pytest.fixture
def nano() -> RunConfig:
    return RunConfig(name="nano")


def corpus(tmp_path: Path, config: RunConfig, *, tokens: int = 4096) -> RunConfig:
    for split in ("train", "validation"):
        (tmp_path / "code" / split).mkdir(parents=True)
    vocab = {str(number): number for number in range(tokens - 1)}
    extra = [{"id": tokens - 1, "content": "<end>"}]
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": extra})
    (tmp_path / "tokenizer.json").write_text(text)
    sources = {"code": SourceConfig(path=str(tmp_path / "code"))}
    data = DataConfig(sources=sources, tokenizer=str(tmp_path / "tokenizer.json"))
    return replace(config, data=data)


def test_a_missing_corpus_says_how_to_make_it(nano: RunConfig, tmp_path: Path) -> None:
    config = corpus(tmp_path, nano)
    assert corpus_problems(config) == []
    (tmp_path / "code/validation").rmdir()
    (tmp_path / "tokenizer.json").unlink()
    shards, tokenizer = corpus_problems(config)
    assert shards.startswith(f"data.sources.code.path={tmp_path}/code: no validation shards")
    assert tokenizer.startswith(f"data.tokenizer={tmp_path}/tokenizer.json: no such file")
    assert shards.endswith("mneme data build quickstart")
    assert tokenizer.endswith("mneme data build quickstart")
    assert len(corpus_problems(replace(config, evaluate=EvaluateConfig(every_steps=0)))) == 1


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("niah", "mneme data build niah"),
        ("pictures", "mneme data build quickstart_mm"),
        ("mine", "mneme data build {} --source mine, and your files (see --help)"),
    ],
)
def test_every_source_has_its_own_command(
    nano: RunConfig, tmp_path: Path, folder: str, command: str
) -> None:
    config = corpus(tmp_path, nano)
    sources = {"name": SourceConfig(path=str(tmp_path / folder))}
    [problem] = corpus_problems(replace(config, data=replace(config.data, sources=sources)))
    assert problem.endswith(f"make them with: {command.format(tmp_path)}")


def test_a_vocabulary_that_does_not_hold_the_tokenizer_is_refused(
    nano: RunConfig, tmp_path: Path
) -> None:
    [problem] = corpus_problems(corpus(tmp_path, nano, tokens=5000))
    assert problem.startswith("model.vocab_size=4096: smaller than the 5000 tokens of")
    assert problem.endswith("use model.vocab_size=5000")


@pytest.mark.parametrize("name", ["code/manifest.json", "code.idx"])
def test_sources_without_splits_need_no_folders(nano: RunConfig, tmp_path: Path, name: str) -> None:
    config = corpus(tmp_path, nano)
    for split in ("train", "validation"):
        (tmp_path / "code" / split).rmdir()
    assert len(corpus_problems(config)) == 1
    (tmp_path / name).touch()
    assert corpus_problems(config) == []
    remote = {"code": SourceConfig(path="s3://bucket/code")}
    assert corpus_problems(replace(config, data=replace(config.data, sources=remote))) == []
