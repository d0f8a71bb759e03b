import json
import re
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from launch.cli import main
from tests.unit.train.checkpoint.runs import (
    exported,
    imported,
    noisy,
    read_folder,
    read_run,
    same,
    write_run,
)
from tests.unit.train.model.tiny import FULL, TINY, with_changes
from train.checkpoint.huggingface.config import family_of, from_json, to_json
from train.checkpoint.huggingface.families import FAMILIES, TRAINING_ONLY
from train.checkpoint.huggingface.folder import FolderReader, FolderWriter, TensorInfo
from train.checkpoint.huggingface.names import pieces, their_shapes
from train.model.config import ModelConfig
from train.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

V3 = replace(TINY, residual="plain", swiglu_limit=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v3")
    return exported(write_run(path / "run", noisy(replace(V3, mtp_depth=1))), path / "folder")


def leaves(value: Any, prefix: str = "") -> list[str]:
    """Paths of all keys, those of sections that are null included."""
    found = []
    for field in fields(value):
        item = getattr(value, field.name)
        nested = is_dataclass(item)
        found += leaves(item, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_model_is_converted_or_refused(family: Any) -> None:
    """A key that is added to the model must be decided upon here, or exports would drop it."""
    known = FAMILIES[family]
    decided = {*known.pairs.values(), *known.required, *known.ours, *TRAINING_ONLY, "mtp_depth"}
    undecided = [
        path
        for path in leaves(ModelConfig())
        if path not in decided and not f"{path}.".startswith(tuple(f"{x}." for x in known.unused))
    ]
    assert not undecided


V3_PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V4_FLASH_PUBLISHED = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}


@pytest.mark.parametrize("published", [V3_PUBLISHED, V4_FLASH_PUBLISHED])
def test_the_published_configs_come_back(published: dict[str, Any]) -> None:
    model = from_json(published, ModelConfig(), has_mtp=True)
    again = to_json(model, max_positions=1)
    differing = {key for key, value in published.items() if again.get(key) != value}
    assert differing - {"hc_eps"} <= {
        *("bos_token_id", "eos_token_id", "ep_size", "expert_dtype", "quantization_config"),
        *("torch_dtype", "transformers_version", "use_cache"),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hc_eps": 1e-3}, "hc_eps=0.001: only up to 1e-06"),
        ({"layer_types": ["sliding_attention"] * 43}, "and the two must agree"),
        ({"compress_ratios": [0, 0, *[4, 64] * 20, 4, 0]}, "compress_ratios"),
        ({"mlp_layer_types": ["moe", "hash_moe"]}, "only leading layers can be hash_moe"),
        ({"n_shared_experts": 2}, "n_shared_experts=2: only 1 is computed here"),
        ({"scoring_func": "softmax"}, 'scoring_func="softmax": only "sqrtsoftplus"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 0.125"),
        (
            {"rope_parameters": {"main": {"rope_type": "default", "rope_theta": 1e4}}},
            "only the frequencies of rope_theta and compress_rope_theta",
        ),
        (
            {"rope_parameters": {"compress": {"rope_theta": 160000, "attention_factor": 1.2}}},
            "with yarn and attention_factor=1",
        ),
    ],
)
def test_a_v4_that_we_do_not_compute_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        from_json(V4_FLASH_PUBLISHED | changes, ModelConfig(), has_mtp=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"residual": "mhc"}, 'model.residual="mhc": deepseek_v3 has only model.residual="plain"'),
        ({"engram": FULL.engram}, "deepseek_v3 has only model.engram=null"),
        ({"swiglu_limit": 10.0}, "model.swiglu_limit=10.0: deepseek_v3 has only"),
        ({"router": "softmax"}, 'model.router="softmax": deepseek_v3 has only'),
        ({"attention": "dsa", "residual": "hc"}, 'model.residual="hc": deepseek_v32 has only'),
    ],
)
def test_what_a_family_cannot_hold_is_refused_by_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="cannot be exported") as error:
        to_json(with_changes(V3, **changes), max_positions=64)
    assert said in str(error.value)


def test_all_keys_that_are_in_the_way_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="cannot be exported") as error:
        to_json(FULL, max_positions=64)
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "model.residual",
        "model.engram",
        "model.swiglu_limit",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, 'config.json: hidden_act="gelu": only "silu" is computed here'),
        ({"rope_interleave": False}, "rope_interleave=false: only true"),
        ({"attention_bias": True}, "attention_bias=true: only false"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1: only 2"),
        ({"new_trick": 3}, "config.json: new_trick=3: has no counterpart here"),
        ({"q_lora_rank": None}, "missing: model.layers.0.self_attn.q_proj.weight"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_parameters={"type": "linear"'),
        ({"quantization_config": {"quant_method": "awq"}}, "convert the weights to bf16"),
        ({"model_type": "llama"}, "model_type=llama: cannot be imported; there is deepseek_v3"),
        ({"hidden_size": 64}, "not the shape that config.json says: model.embed_tokens.weight[64"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4.input_layernorm.weight"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused_by_name(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    found = json.loads((folder / "config.json").read_text()) | changes
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(found))
    code = main(["checkpoint", "import-hf", str(copy), str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def with_tensors(folder: Path, target: Path, changes: dict[str, Tensor | None]) -> Path:
    """A copy of a folder in one file, with some tensors changed or left out."""
    target.mkdir()
    tensors = read_folder(folder)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


_NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({_NORM: None}, f"missing: {_NORM}"),
        ({"model.layers.1.self_attn.alibi": torch.ones(2)}, "no counterpart in the model of conf"),
        ({_NORM: torch.ones(31)}, f"not the shape that config.json says: {_NORM}[31] must be [32]"),
        ({_NORM: torch.ones(32).to(torch.float8_e4m3fn)}, "quantised, such as model.layers.1.inp"),
        ({"model.layers.3.embed_tokens.weight": torch.ones(64, 32)}, "here both are one tensor"),
        (
            {"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(16, 32).bfloat16()},
            "made of tensors of several types: layers.1.ffn.experts.gate_up",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, Tensor | None], said: str
) -> None:
    source = with_tensors(folder, tmp_path / "source", changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        imported(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frequencies_and_missing_copies_are_no_reason_to_refuse(
    folder: Path, tmp_path: Path
) -> None:
    changes = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.3.embed_tokens.weight": None,
        "model.layers.3.shared_head.head.weight": None,
    }
    source = with_tensors(folder, tmp_path / "source", changes)
    run = imported(source, tmp_path / "run")
    assert same(read_run(run), read_run(imported(folder, tmp_path / "other")))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("checkpoint", "the following arguments are required: ACTION"),
        ("checkpoint import-hf nowhere run", "nowhere: no config.json"),
        ("checkpoint export-hf nowhere folder", "nowhere: holds no checkpoint; give a run dir"),
        ("checkpoint export-hf {run} out --max-shard-size 5", "--max-shard-size 5: not a size"),
        ("checkpoint export-hf {run} {run}", "exists and is not empty; use another name"),
        ("checkpoint export-hf {run} out --dtype fp8", "invalid choice: 'fp8'"),
        ("checkpoint import-hf {folder} out train.steps=3", "name one with --recipe"),
        ("checkpoint import-hf {folder} out --recipe v4_nan", "v4_nan: no such recipe"),
        (
            "checkpoint import-hf {folder} out --recipe v4_nano model.hidden_size=8",
            "model.hidden_size=8: config.json decides the model; leave it out",
        ),
    ],
)
def test_wrong_input_is_2_and_a_message(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    words = command.format(run=folder.parent / "run", folder=folder).split()
    try:
        code = main(words)
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err


def test_a_recipe_gives_everything_but_the_model(folder: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=50", "model.mtp_loss_weight=0.125", "optim.learning_rate=1e-05"]
    words = ["import-hf", str(folder), str(tmp_path / "run"), "--recipe", "v4_nano", *overrides]
    assert main(["checkpoint", *words]) == 0
    from train.recipe import load_resolved  # noqa: PLC0415

    config = load_resolved(tmp_path / "run" / "recipe.yaml")
    assert (config.name, config.train.steps) == ("v4_nano", 50)
    assert config.optim.learning_rate == 1e-5
    assert (config.model.mtp_loss_weight, config.model.mtp_depth) == (0.125, 1)
    assert config.model.hidden_size == 32
    assert config.data.sources


def test_files_are_laid_out_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "c": torch.randn(5),
        "large": torch.randn(50, 2),
        "d": torch.randn(1).bfloat16(),
    }
    infos = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    writer = FolderWriter(tmp_path, infos, max_shard_bytes=120)
    for name in reversed(tensors):
        writer.tensor(name).copy_(tensors[name])
    writer.close()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert same(read_folder(tmp_path), tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in infos.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    with FolderReader(tmp_path) as reader:
        assert reader.tensors == infos
        assert torch.equal(reader.read("large", (3, 1), (2, 1)), tensors["large"][3:5, 1:])


def test_fp8_in_blocks_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """Against the reader of torch's DCP; a matrix whose sides are no multiples of a block."""
    name = "q.weight"
    matrix = torch.randn(300, 200).to(torch.float8_e4m3fn)
    tensors = {name: matrix, f"{name}_scale_inv": torch.rand(3, 2) + 0.5, "v": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    wanted = {name: torch.empty(300, 200)}
    load(wanted, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    with FolderReader(tmp_path) as reader:
        assert reader.tensors == {
            name: TensorInfo((300, 200), torch.bfloat16),
            "v": TensorInfo((3, 2), torch.float32),
        }
        assert torch.equal(reader.read(name, (0, 0), (300, 200)), wanted[name].bfloat16())
        part = reader.read(name, (100, 60), (90, 140))
        assert torch.equal(part, wanted[name][100:190, 60:].bfloat16())


def anonymous_memory() -> int:
    """Bytes that the kernel could not write back to a file to make room."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 MB of weights pass through, 2 MB at a time."""
    moe = replace(V3.moe, num_experts=32, expert_intermediate_size=512)
    config = replace(V3, hidden_size=512, moe=moe)
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    family = family_of(config)
    found = pieces(family, config.num_layers, {name: tuple(size) for name, size in sizes.items()})
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in their_shapes(found).items()}
    total = sum(info.nbytes for info in infos.values())
    FolderWriter(folder, infos, max_shard_bytes=total // 3).close()
    (folder / "config.json").write_text(json.dumps(to_json(config, max_positions=64)))
    peak = 0

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal peak
            result = function(*arguments)
            peak = max(peak, anonymous_memory())
            return result

        return call

    monkeypatch.setattr(FolderReader, "read", watched(FolderReader.read))
    monkeypatch.setattr(FolderWriter, "tensor", watched(FolderWriter.tensor))
    for convert, source, target in (
        (imported, folder, tmp_path / "run"),
        (exported, tmp_path / "run", tmp_path / "again"),
    ):
        before, peak = anonymous_memory(), 0
        convert(source, target)
        assert peak > 0, "nothing was watched"
        assert peak - before < 16e6 < total / 10
