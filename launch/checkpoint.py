"""`mneme checkpoint import-hf` and `export-hf`: a run from a Hugging Face folder, and one from a run.

`launch.cli` calls these. What they write appears under its name when it is whole.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from data.tokenizer import END_OF_DOCUMENT, PADDING
from launch.compose import RecipeError, compose
from launch.run_dir import started_in, write_environment, write_recipe, write_status
from launch.validate import validate
from train.checkpoint.commit import begin, commit, newest_checkpoint
from train.checkpoint.huggingface.config import from_json, read_json, to_json
from train.checkpoint.huggingface.families import TRAINING_ONLY
from train.checkpoint.huggingface.names import Family, has_mtp, published_name
from train.config import RunConfig
from train.model.config import ModelConfig
from train.recipe import load_resolved
from train.stages import phases

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_TOKENIZER = "tokenizer.json"
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Said, for transformers has defaults that would be wrong."""


def import_hf(
    source: Path, destination: Path, *, recipe: str | None, overrides: Sequence[str]
) -> int:
    """Make a run whose checkpoint of step 0 holds the weights of a Hugging Face folder.

    `config.json` decides the model; everything else comes from a recipe, or is the schema's default
    until `mneme resume` sets it.

    Raises:
        ValueError: the folder, the recipe or the destination cannot be used.
    """
    from train.checkpoint.huggingface.folder import FolderReader  # noqa: PLC0415
    from train.checkpoint.huggingface.from_folder import import_weights  # noqa: PLC0415
    from train.checkpoint.state import write_meta  # noqa: PLC0415

    found = read_json(source)
    family = cast("Family", found["model_type"])
    base = _base(recipe, overrides, destination)
    published = partial(published_name, family)
    with FolderReader(source, published) as reader, _whole(destination) as run_dir:
        mtp = has_mtp(family, found["num_hidden_layers"], reader.tensors)
        config = replace(base, model=from_json(found, base.model, has_mtp=mtp))
        if recipe is None:
            config = _with_tokenizer(config, source, destination, run_dir)
        elif problems := validate(config):
            raise RecipeError(problems)
        temporary = begin(run_dir, 0)
        import_weights(reader, family, config.model, temporary)
        write_meta(temporary, step=0, tokens=0, corpus="", world_size=0, only_weights=True)
        commit(temporary)
        write_environment(run_dir)
        write_recipe(run_dir, config, overrides)
        write_status(run_dir, state="stopped", reason=f"imported from {source}", ranks=0)
    print(f"{destination}: a run that starts from these weights, its optimizer from zero")
    missing = "" if config.data.sources else " 'data.sources={NAME: {path: CORPUS}}'"
    print(f"  mneme resume {destination}{missing}")
    return 0


def export_hf(source: Path, destination: Path, *, dtype: str | None, max_shard_size: str) -> int:
    """Write a checkpoint, or the newest one of a run, as a folder that transformers loads.

    Raises:
        ValueError: no Hugging Face family holds the model, or source or destination cannot be used.
    """
    from train.checkpoint.huggingface.to_folder import export_weights  # noqa: PLC0415

    run_dir, checkpoint = _find_checkpoint(source)
    config = load_resolved(run_dir / "recipe.yaml")
    model, positions = _trained_at(config, checkpoint)
    written = to_json(model, max_positions=positions)
    max_bytes = _parse_size(max_shard_size)
    with _whole(destination) as folder:
        written["torch_dtype"] = export_weights(
            checkpoint, model, folder, dtype=dtype, max_shard_bytes=max_bytes
        )
        tokenizer = _find_tokenizer(config, run_dir)
        written |= _write_tokenizer(tokenizer, folder) if tokenizer else _NO_TOKENS
        text = json.dumps(written, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    print(f"{destination}: {checkpoint} as {written['model_type']}")
    if tokenizer is None:
        print(f"  without a tokenizer: data.tokenizer={config.data.tokenizer} is not here")
    return 0


def _base(recipe: str | None, overrides: Sequence[str], destination: Path) -> RunConfig:
    """What the model is put into."""
    decided = [
        f"{text}: config.json decides the model; leave it out"
        for text in overrides
        if re.match(r"\+*~?model\b", text)
        and not text.startswith(tuple(f"model.{key}=" for key in TRAINING_ONLY))
    ]
    if decided:
        raise RecipeError(decided)
    if recipe is not None:
        return compose(recipe, overrides).config
    if overrides:
        raise RecipeError([f"{overrides[0]}: changes a recipe; name one with --recipe"])
    return RunConfig(name=re.sub(r"[^A-Za-z0-9_.-]+", "-", destination.name).lstrip("_.-") or "run")


def _with_tokenizer(config: RunConfig, source: Path, destination: Path, run_dir: Path) -> RunConfig:
    """Keep the folder's tokenizer with the run, if it has one."""
    if not (source / _TOKENIZER).is_file():
        return config
    shutil.copyfile(source / _TOKENIZER, run_dir / _TOKENIZER)
    return replace(
        config, data=replace(config.data, tokenizer=str(destination.absolute() / _TOKENIZER))
    )


def _find_checkpoint(source: Path) -> tuple[Path, Path]:
    """The run directory and the checkpoint that a user means by either of the two."""
    if (source / "checkpoint.json").is_file():
        return source.absolute().parents[1], source
    newest = newest_checkpoint(source)
    if newest is None or not (source / "recipe.yaml").is_file():
        raise ValueError(
            f"{source}: holds no checkpoint; give a run directory, or one checkpoints/step-N of it"
        )
    return source, newest[1]


def _trained_at(config: RunConfig, checkpoint: Path) -> tuple[ModelConfig, int]:
    """The model and the sequence length of the stage that a checkpoint was saved in."""
    step = int(checkpoint.name.removeprefix("step-"))
    phase = [phase for phase in phases(config) if phase.first_step <= max(step, 1)][-1]
    model = config.model
    if phase.indexer_stage is not None:
        model = replace(model, indexer=replace(model.indexer, stage=phase.indexer_stage))
    return model, phase.sequence_length


def _find_tokenizer(config: RunConfig, run_dir: Path) -> Path | None:
    """The tokenizer of a run; its path may be relative to where the run was started."""
    path = Path(config.data.tokenizer)
    places = [path, *([started / path] if (started := started_in(run_dir)) else [])]
    return next((place for place in places if place.is_file()), None)


def _write_tokenizer(tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Copy a tokenizer; returns what config.json says about it."""
    shutil.copyfile(tokenizer, folder / _TOKENIZER)
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    named = {"eos": END_OF_DOCUMENT, "pad": PADDING}
    known = {kind: token for kind, token in named.items() if token in ids}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {f"{kind}_token": token for kind, token in known.items()}
    text = json.dumps(settings, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return _NO_TOKENS | {f"{kind}_token_id": ids[token] for kind, token in known.items()}


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if not match or not int(match[1]):
        raise ValueError(f"--max-shard-size {text}: not a size; use for example 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A directory to write into that becomes `destination` when the block ends well.

    Raises:
        ValueError: there is something under that name.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: exists and is not empty; use another name")
    temporary = destination.with_name(destination.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if destination.exists():
            destination.rmdir()
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
