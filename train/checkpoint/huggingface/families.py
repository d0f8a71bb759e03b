"""How the keys of `config.json` relate to `model.*`, per family; `config` converts by these tables.

A key of theirs is paired with one of ours, or must have the value that our model computes, or
changes nothing that is computed. A key of ours is paired, or must have the value that the family can
hold, or matters in training only. No torch.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from train.checkpoint.huggingface.names import Family

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FamilyKeys:
    """The keys of one family."""

    architecture: str
    """Class in transformers."""
    pairs: Mapping[str, str]
    """Their key -> ours below `model`."""
    fixed: Mapping[str, object]
    """Their keys with one value that our model computes; they may be missing."""
    required: Mapping[str, object]
    """Our keys with one value that the family can hold."""
    unused: tuple[str, ...]
    """Keys and sections of ours that mean nothing under `required`."""
    write: Callable[[Json], Json]
    """Our model -> what `pairs` and `fixed` leave out of theirs."""
    read: Callable[[Json], Json]
    """Theirs -> what `pairs` and `required` leave out of our model, by path."""
    ours: frozenset[str]
    """Paths that `read` gives."""
    theirs: frozenset[str]
    """Keys that `read` takes."""
    derived: Callable[[Json], Json]
    """Their keys -> values of those that follow from others."""


TRAINING_ONLY = (
    *("initializer_range", "mtp_loss_weight", "mtp_loss_weight_final", "indexer.loss_weight"),
    "hyper_connection.compile",
    *("moe.bias_update_speed", "moe.balance_loss_weight", "moe.hash_seed"),
    *("hyper_connection.gate_init", "hyper_connection.phi_init_std"),
    "hyper_connection.residual_bias_init",
)
"""Our keys that do not change what a trained model computes; an import takes them from the recipe."""
NO_EFFECT = {
    *("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path"),
    *("dtype", "torch_dtype", "use_cache", "output_router_logits", "pretraining_tp", "ep_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
    *("initializer_range", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
    *("num_nextn_predict_layers", "expert_dtype"),
}
"""Their keys that do not change what a trained model computes."""
FP8_BLOCK = 128
"""Rows, and columns, that share a scale in matrices of fp8 (DeepSeek-V3, section 3.3.2)."""

_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
_PAIRS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.num_experts_per_token",
    "moe_intermediate_size": "moe.expert_intermediate_size",
    "routed_scaling_factor": "moe.routed_scaling_factor",
}
_INDEXER_PAIRS = {
    "index_n_heads": "indexer.num_heads",
    "index_head_dim": "indexer.head_dim",
    "index_topk": "indexer.top_k",
}

_YARN = ("factor", "original_max_position_embeddings")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
_MSCALES = ("mscale", "mscale_all_dim")


def _read_yarn(rope: Json, more: tuple[str, ...] = ()) -> Json | None:
    """Our `yarn` from theirs, which must say `more` as well."""
    rest = dict(rope)
    kind = rest.pop("rope_type", "default")
    kind = rest.pop("type", kind)
    needed = {*_YARN, *more}
    if kind == "default" and not rest:
        return None
    if kind != "yarn" or not rest.keys() >= needed or rest.keys() - needed - {*_YARN_DEFAULTS}:
        raise ValueError(
            f"config.json: rope_parameters={json.dumps(rope)}: only yarn with "
            f"{', '.join([*_YARN, *_YARN_DEFAULTS, *more])} is computed here"
        )
    rest = {**_YARN_DEFAULTS, **rest}
    return {key: value if key == _YARN[1] else float(value) for key, value in rest.items()}


# DeepSeek-V3 and V3.2.

_V3_PAIRS = {
    **_PAIRS,
    "first_k_dense_replace": "num_dense_layers",
    "intermediate_size": "intermediate_size",
    "q_lora_rank": "mla.q_lora_rank",
    "kv_lora_rank": "mla.kv_lora_rank",
    "qk_nope_head_dim": "mla.qk_nope_head_dim",
    "qk_rope_head_dim": "mla.qk_rope_head_dim",
    "v_head_dim": "mla.v_head_dim",
    "n_shared_experts": "moe.num_shared_experts",
    "n_group": "moe.num_expert_groups",
    "topk_group": "moe.num_groups_per_token",
}
_V3_FIXED = {**_FIXED, "moe_layer_freq": 1, "scoring_func": "sigmoid"}
_V3_REQUIRED = {
    "residual": "plain",
    "router": "sigmoid",
    "moe.num_hash_layers": 0,
    "engram": None,
    "vision": None,
    "mtp_kind": "v3",
    "swiglu_limit": None,
}


def _write_v3(model: Json) -> Json:
    yarn = model["mla"]["yarn"]
    return {
        "rope_theta": model["mla"]["rope_theta"],
        "rope_scaling": None if yarn is None else {"type": "yarn", **yarn},
    }


def _read_v3(found: Json) -> Json:
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", found.get("rope_theta", 10000.0)))
    return {"mla.rope_theta": theta, "mla.yarn": _read_yarn(rope, _MSCALES)}


def _derived_v3(found: Json) -> Json:
    layers, dense = found.get("num_hidden_layers", 0), found.get("first_k_dense_replace", 0)
    rope = found.get("qk_rope_head_dim", 0)
    return {
        "head_dim": rope,
        "qk_head_dim": rope + found.get("qk_nope_head_dim", 0),
        "num_key_value_heads": found.get("num_attention_heads"),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "layer_types": ["indexed_attention"] * layers,
    }


_V3 = FamilyKeys(
    architecture="DeepseekV3ForCausalLM",
    pairs=_V3_PAIRS,
    fixed={**_V3_FIXED, "rope_interleave": True},
    required={**_V3_REQUIRED, "attention": "mla"},
    unused=("hyper_connection", "indexer", "compressed"),
    write=_write_v3,
    read=_read_v3,
    ours=frozenset({"mla.rope_theta", "mla.yarn"}),
    theirs=frozenset({"rope_theta", "rope_scaling", "rope_parameters"}),
    derived=_derived_v3,
)
_V32 = FamilyKeys(
    architecture="DeepseekV32ForCausalLM",
    pairs={**_V3_PAIRS, **_INDEXER_PAIRS},
    fixed={**_V3_FIXED, "mlp_bias": False},
    required={**_V3_REQUIRED, "attention": "dsa", "indexer.stage": "sparse"},
    unused=("hyper_connection", "compressed"),
    write=_write_v3,
    read=_read_v3,
    ours=frozenset({"mla.rope_theta", "mla.yarn"}),
    theirs=frozenset({"rope_theta", "rope_scaling", "rope_parameters"}),
    derived=_derived_v3,
)

# DeepSeek-V4.

_SLIDING, _CSA, _HCA = (
    *("sliding_attention", "compressed_sparse_attention"),
    "heavily_compressed_attention",
)
_DEFAULT_RATES = {_CSA: 4, _HCA: 128}
_LARGEST_HC_EPS = 1e-6
"""Theirs adds it to the maps of mHC, ours adds nothing."""


def _write_v4(model: Json) -> Json:
    v4, layers, yarn = model["compressed"], model["num_layers"], model["compressed"]["yarn"]
    kinds = {0: _SLIDING, v4["csa_ratio"]: _CSA, v4["hca_ratio"]: _HCA}
    ratios, hashed = list(v4["compress_ratios"]), model["moe"]["num_hash_layers"]
    scaling = {key: yarn[key] for key in (*_YARN, *_YARN_DEFAULTS)} if yarn else None
    return {
        "compress_ratios": ratios[: layers + model["mtp_depth"]],
        "layer_types": [kinds[ratio] for ratio in ratios[:layers]],
        "compress_rates": {_CSA: v4["csa_ratio"], _HCA: v4["hca_ratio"]},
        "num_hash_layers": hashed,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "rope_scaling": None if scaling is None else {"type": "yarn", **scaling},
        "hc_eps": 0.0,
    }


def _read_v4(found: Json) -> Json:
    if found.get("hc_eps", 0.0) > _LARGEST_HC_EPS:
        raise ValueError(
            f"config.json: hc_eps={found['hc_eps']}: only up to {_LARGEST_HC_EPS} is close enough "
            "to the 0 that is computed here"
        )
    rates = {**_DEFAULT_RATES, **found.get("compress_rates", {})}
    yarn = _read_v4_yarn(found)
    return {
        "compressed.yarn": yarn and yarn | dict.fromkeys(_MSCALES, 1.0),
        "compressed.csa_ratio": rates[_CSA],
        "compressed.hca_ratio": rates[_HCA],
        "compressed.compress_ratios": _read_ratios(found, rates),
        "moe.num_hash_layers": _read_hash_layers(found),
    }


def _read_v4_yarn(found: Json) -> Json | None:
    """It concerns the layers with entries only; their tables are not scaled."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    thetas = {"main": found.get("rope_theta"), "compress": found.get("compress_rope_theta")}
    nested = [kind for kind in thetas if kind in rope]
    parts = {kind: dict(rope[kind]) for kind in nested} or {"main": {}, "compress": dict(rope)}
    computed = len(parts) == len(thetas)
    for kind, part in parts.items():
        part.pop("partial_rotary_factor", None)
        computed &= part.pop("rope_theta", thetas[kind]) == thetas[kind]
        computed &= part.pop("attention_factor", 1.0) == 1.0
    yarns = {kind: _read_yarn(part) for kind, part in parts.items()}
    if not computed or yarns["main"] is not None:
        raise ValueError(
            f"config.json: rope_parameters={json.dumps(rope)}: only the frequencies of rope_theta "
            "and compress_rope_theta are computed here, the latter with yarn and attention_factor=1"
        )
    return yarns["compress"]


def _read_ratios(found: Json, rates: Mapping[str, int]) -> list[int]:
    """From the list that DeepSeek writes, which goes on for MTP, or from transformers' names."""
    kinds = {_SLIDING: 0, **rates}
    named = [kinds[kind] for kind in found.get("layer_types", [])]
    ratios = list(found.get("compress_ratios", named))
    if not ratios or named not in ([], ratios[: len(named)]):
        raise ValueError(
            f"config.json: compress_ratios={ratios}: must be there, or layer_types, and the two "
            "must agree"
        )
    return ratios


def _read_hash_layers(found: Json) -> int:
    kinds = found.get("mlp_layer_types", [])
    number = found.get("num_hash_layers", kinds.count("hash_moe"))
    if kinds not in ([], ["hash_moe"] * number + ["moe"] * (len(kinds) - number)):
        raise ValueError(
            f"config.json: mlp_layer_types={json.dumps(kinds)}: only leading layers can be hash_moe"
        )
    return int(number)


def _derived_v4(found: Json) -> Json:
    rope, width = found.get("qk_rope_head_dim", 0), found.get("head_dim", 1)
    return {"partial_rotary_factor": rope / width, "num_key_value_heads": 1}


_V4 = FamilyKeys(
    architecture="DeepseekV4ForCausalLM",
    pairs={
        **_PAIRS,
        **_INDEXER_PAIRS,
        "q_lora_rank": "compressed.q_lora_rank",
        "head_dim": "compressed.head_dim",
        "qk_rope_head_dim": "compressed.rope_head_dim",
        "rope_theta": "compressed.rope_theta",
        "compress_rope_theta": "compressed.compress_rope_theta",
        "sliding_window": "compressed.sliding_window",
        "o_groups": "compressed.output_groups",
        "o_lora_rank": "compressed.output_lora_rank",
        "hc_mult": "hyper_connection.num_streams",
        "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
        "swiglu_limit": "swiglu_limit",
    },
    fixed={
        **_FIXED,
        "mlp_bias": False,
        "n_shared_experts": 1,
        "router_jitter_noise": 0.0,
        "scoring_func": "sqrtsoftplus",
    },
    required={
        "attention": "v4_hybrid",
        "indexer.stage": "sparse",
        "residual": "mhc",
        "hyper_connection.read_out": "gated",
        "router": "sqrtsoftplus",
        "num_dense_layers": 0,
        "moe.num_shared_experts": 1,
        "moe.num_expert_groups": 1,
        "moe.num_groups_per_token": 1,
        "engram": None,
        "vision": None,
        "mtp_kind": "v4",
    },
    unused=("mla", "intermediate_size"),
    write=_write_v4,
    read=_read_v4,
    ours=frozenset(
        {
            *("compressed.yarn", "compressed.csa_ratio", "compressed.hca_ratio"),
            *("compressed.compress_ratios", "moe.num_hash_layers"),
        }
    ),
    theirs=frozenset(
        {
            *("rope_scaling", "rope_parameters", "compress_ratios", "compress_rates"),
            *("layer_types", "num_hash_layers", "mlp_layer_types", "hc_eps"),
        }
    ),
    derived=_derived_v4,
)

FAMILIES: Mapping[Family, FamilyKeys] = {
    "deepseek_v3": _V3,
    "deepseek_v32": _V32,
    "deepseek_v4": _V4,
}
