"""`config.json` of a Hugging Face folder and `model.*` of a recipe, both ways. No torch.

By the tables of `families`. What a table does not know is refused by name, in both directions:
nothing is dropped silently.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from train.checkpoint.huggingface.families import FAMILIES, FP8_BLOCK, NO_EFFECT, FamilyKeys, Json
from train.checkpoint.huggingface.names import Family
from train.model.config import ModelConfig
from train.model.rules import violations

_ADAPTER = TypeAdapter(ModelConfig)


def family_of(model: ModelConfig) -> Family:
    """The family that may hold a model of ours, by its attention."""
    [family] = (
        name for name, keys in FAMILIES.items() if keys.required["attention"] == model.attention
    )
    return family


def to_json(model: ModelConfig, *, max_positions: int) -> Json:
    """`config.json` with which transformers computes what the model computes.

    Args:
        model: ours.
        max_positions: positions that it was trained on; with YaRN its own are written.

    Raises:
        ValueError: the family cannot hold the model; names every key that is in the way.
    """
    family = family_of(model)
    keys, plain = FAMILIES[family], _plain(model)
    if wrong := list(_impossible(family, keys, plain)):
        raise ValueError("\n".join(wrong))
    written = {theirs: _get(plain, ours) for theirs, ours in keys.pairs.items()}
    written |= {**keys.fixed, **keys.write(plain)}
    written["num_key_value_heads"] = keys.derived(written)["num_key_value_heads"]
    yarn = written["rope_scaling"]
    if yarn is not None:
        max_positions = int(yarn["factor"] * yarn["original_max_position_embeddings"])
    return written | {
        "architectures": [keys.architecture],
        "model_type": family,
        "max_position_embeddings": max_positions,
        "num_nextn_predict_layers": model.mtp_depth,
        "initializer_range": model.initializer_range,
    }


def _impossible(family: Family, keys: FamilyKeys, plain: Json) -> Iterator[str]:
    """What the family cannot hold."""
    for path, wanted in keys.required.items():
        value = _get(plain, path)
        meaningless = path == "mtp_kind" and not plain["mtp_depth"]
        if value != wanted and not meaningless:
            yield (
                f"model.{path}={_show(value)}: {family} has only model.{path}={_show(wanted)}; a "
                "model with it cannot be exported"
            )
    for path in keys.pairs.values():
        value = _get(plain, path)
        # Their queries, too, may be without a rank.
        absent = value is None and path != "mla.q_lora_rank"
        if absent or (path, value) == ("moe.num_shared_experts", 0):
            yield (
                f"model.{path}={_show(value)}: {family} always has it; a model without cannot be "
                "exported"
            )


def read_json(folder: Path) -> Json:
    """The `config.json` of a folder.

    Raises:
        ValueError: it is missing, no JSON object, or of a family that is not here.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; give a folder that save_pretrained wrote")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={found.get('model_type')}: cannot be imported; there is "
            f"{', '.join(FAMILIES)}"
        )
    return cast("Json", found)


def from_json(found: Json, base: ModelConfig, *, has_mtp: bool) -> ModelConfig:
    """Our model that computes what transformers computes with this `config.json`.

    Args:
        found: of `read_json`.
        base: gives the keys of `families.TRAINING_ONLY`.
        has_mtp: whether the folder holds a block of multi-token prediction; transformers' config
            speaks of one that its own folders do not hold.

    Raises:
        ValueError: it computes something that our model does not; names every such key.
    """
    keys = FAMILIES[cast("Family", found["model_type"])]
    quantised = found.get("quantization_config")
    if quantised is not None and (
        quantised.get("quant_method") != "fp8"
        or quantised.get("weight_block_size") != [FP8_BLOCK] * 2
    ):
        raise ValueError(
            f"config.json: quantization_config={_show(quantised)}: only fp8 in blocks of "
            f"{FP8_BLOCK} x {FP8_BLOCK} can be read; convert the weights to bf16 first"
        )
    wrong = [*_unknown(found, keys), *_differing(found, {**keys.fixed, **keys.derived(found)})]
    wrong += [f"config.json: no {key}; it must say it" for key in keys.pairs if key not in found]
    if wrong:
        raise ValueError("\n".join(wrong))
    values = {ours: found[theirs] for theirs, ours in keys.pairs.items()}
    values |= {**keys.required, **keys.read(found), "mtp_depth": int(has_mtp)}
    plain = _plain(base)
    for path, value in values.items():
        _set(plain, path, value)
    model = _ADAPTER.validate_json(json.dumps(plain), strict=True)
    if problems := violations(model):
        raise ValueError("\n".join(problems))
    return model


def _unknown(found: Json, keys: FamilyKeys) -> Iterator[str]:
    known = {
        "quantization_config",
        *keys.pairs,
        *keys.fixed,
        *keys.theirs,
        *keys.derived(found),
        *NO_EFFECT,
    }
    for key in sorted(found.keys() - known):
        yield f"config.json: {key}={_show(found[key])}: has no counterpart here"


def _differing(found: Json, wanted: Mapping[str, object]) -> Iterator[str]:
    for key, value in wanted.items():
        if key in found and found[key] != value:
            yield f"config.json: {key}={_show(found[key])}: only {_show(value)} is computed here"


def _plain(model: ModelConfig) -> Json:
    return cast("Json", _ADAPTER.dump_python(model, mode="json"))


def _get(plain: Json, path: str) -> Any:  # noqa: ANN401 - any plain value
    value: Any = plain
    for key in path.split("."):
        value = value[key]
    return value


def _set(plain: Json, path: str, value: object) -> None:
    *above, key = path.split(".")
    node = _get(plain, ".".join(above)) if above else plain
    node[key] = value


def _show(value: object) -> str:
    return json.dumps(value)
