"""Folders that we write, loaded by transformers, and folders that it writes, loaded by us."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.train.checkpoint.runs import (
    exported,
    imported,
    noisy,
    read_folder,
    read_model,
    read_run,
    same,
    write_run,
)
from tests.unit.train.model.tiny import TINY, relative_error
from train.checkpoint.huggingface.config import family_of, to_json
from train.checkpoint.huggingface.names import published_name
from train.model.attention.config import CompressedConfig, IndexerConfig, YarnConfig
from train.model.config import ModelConfig
from train.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:torch.distributed is disabled",  # of DCP, by the helpers that write and read runs
)

V3 = replace(
    TINY,
    residual="plain",
    swiglu_limit=None,
    moe=replace(TINY.moe, routed_scaling_factor=2.5, num_shared_experts=2),
)
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=24, beta_fast=2.0, beta_slow=0.5)
V32 = replace(V3, attention="dsa", indexer=IndexerConfig(num_heads=16, head_dim=12, top_k=20))
V4 = replace(
    TINY,
    num_layers=4,
    num_dense_layers=0,
    attention="v4_hybrid",
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 16, 4),
        sliding_window=24,
        q_lora_rank=24,
        head_dim=16,
        rope_head_dim=4,
        output_lora_rank=8,
    ),
    indexer=IndexerConfig(num_heads=16, head_dim=12, top_k=6),
    residual="mhc",
    hyper_connection=replace(TINY.hyper_connection, read_out="gated"),
    router="sqrtsoftplus",
    moe=replace(TINY.moe, routed_scaling_factor=1.5, num_hash_layers=1),
    swiglu_limit=10.0,
)
YARN_V4 = YarnConfig(factor=4.0, original_max_position_embeddings=32)
CASES = {
    "v3": replace(V3, moe=replace(V3.moe, num_expert_groups=2)),
    "v3 yarn": replace(V3, mla=replace(V3.mla, yarn=YARN)),
    "v3 no query rank": replace(V3, mla=replace(V3.mla, q_lora_rank=None)),
    "v3 mtp": replace(V3, mtp_depth=1),
    "v3.2": V32,
    "v3.2 yarn": replace(V32, mla=replace(V32.mla, yarn=YARN)),
    "v4": V4,
    "v4 yarn": replace(V4, compressed=replace(V4.compressed, yarn=YARN_V4)),
    "v4 mtp": replace(
        V4,
        mtp_depth=1,
        mtp_kind="v4",
        compressed=replace(V4.compressed, compress_ratios=(0, 4, 16, 4, 0)),
    ),
}
SEQUENCE = 100


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the corpus of a quick start: a tokenizer gives their embedding a padding row."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging  # noqa: PLC0415

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


def from_pretrained(folder: Path, **options: Any) -> Any:
    """Their model; every number of it must come from the folder."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def tokens(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (2, SEQUENCE), generator=generator)


@torch.no_grad()
def our_logits(model: Transformer) -> Tensor:
    ids = tokens(model.config)
    positions = torch.arange(SEQUENCE).expand_as(ids)
    logits: Tensor = model(ids, positions, torch.zeros_like(ids)).logits
    return logits


@torch.no_grad()
def their_logits(model: Any, config: ModelConfig) -> Tensor:
    logits: Tensor = model(input_ids=tokens(config)).logits
    return logits


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_transformers_computes_the_same_from_what_we_export(
    config: ModelConfig, tmp_path: Path
) -> None:
    ours = noisy(config)
    folder = exported(write_run(tmp_path / "run", ours), tmp_path / "folder")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    theirs = from_pretrained(folder)
    assert relative_error(our_logits(ours), their_logits(theirs, config)) < 2e-5


@pytest.mark.parametrize("case", ["v3", "v3 yarn", "v3 no query rank", "v3.2", "v4 yarn"])
def test_we_compute_the_same_from_what_transformers_saves(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    first = exported(write_run(tmp_path / "first", noisy(config)), tmp_path / "folder")
    theirs = from_pretrained(first)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = read_model(imported(tmp_path / "theirs", tmp_path / "run"))
    assert to_json(ours.config, max_positions=9) == to_json(config, max_positions=9)
    assert relative_error(our_logits(ours), their_logits(theirs, config)) < 2e-5
    again = exported(tmp_path / "run", tmp_path / "again")
    published = partial(published_name, family_of(config))
    saved = {published(name): x for name, x in read_folder(tmp_path / "theirs").items()}
    assert same(read_folder(again), saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["v3 mtp", "v3.2 yarn", "v4 mtp"])
def test_both_round_trips_are_bitwise(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CASES[case]
    run = write_run(tmp_path / "run", noisy(config), dtype)
    folder = exported(run, tmp_path / "folder")
    back = imported(folder, tmp_path / "back")
    assert same(read_run(back), read_run(run))
    again = exported(back, tmp_path / "again", max_shard_size="1MB")
    assert same(read_folder(again), read_folder(folder))
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("case", ["v3", "v3.2 yarn", "v4", "v4 yarn"])
def test_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Theirs become the weights of a folder, whose import gives them our names and arrangement."""
    config = CASES[case]
    ours = noisy(config)
    theirs = from_pretrained(exported(write_run(tmp_path / "run", ours), tmp_path / "folder"))
    ids = tokens(config)
    positions = torch.arange(SEQUENCE).expand_as(ids)
    found = ours(ids, positions, torch.zeros_like(ids)).logits
    for logits in (found, theirs(input_ids=ids).logits):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
    with torch.no_grad():
        for parameter in theirs.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = read_model(imported(tmp_path / "gradients", tmp_path / "names"))
    compared = 0
    for name, parameter in ours.named_parameters():
        if ".indexer." not in name:  # theirs does not train it; ours by a loss of its own
            assert parameter.grad is not None
            assert relative_error(parameter.grad, wanted.get_parameter(name)) < 2e-5, name
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_the_eps_that_v4_adds_to_its_maps_is_below_what_is_compared(
    eps: float, tmp_path: Path
) -> None:
    """DeepSeek's config.json says 1e-6; what we export says 0, which is what we compute."""
    ours = noisy(V4)
    folder = exported(write_run(tmp_path / "run", ours), tmp_path / "folder")
    path = folder / "config.json"
    found = json.loads(path.read_text())
    assert found["hc_eps"] == 0.0
    path.write_text(json.dumps(found | {"hc_eps": eps}))
    error = relative_error(our_logits(ours), their_logits(from_pretrained(folder), V4))
    assert error < 2e-5
    imported(folder, tmp_path / "back")


def test_bf16_export_rounds_matrices_and_keeps_the_balancing_bias(tmp_path: Path) -> None:
    ours = noisy(V32)
    folder = exported(write_run(tmp_path / "run", ours), tmp_path / "folder", dtype="bf16")
    found = read_folder(folder)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    wanted = ours.get_parameter("layers.1.ffn.experts.gate_up")[3, 16:]
    assert torch.equal(found[name], wanted.bfloat16())
    bias = found["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, ours.get_buffer("layers.1.ffn.router.expert_bias"))
    assert next(from_pretrained(folder).parameters()).dtype == torch.bfloat16
    rounded = read_model(imported(folder, tmp_path / "back"))
    theirs = from_pretrained(folder, dtype=torch.float32)
    assert relative_error(our_logits(rounded), their_logits(theirs, V32)) < 2e-5


def test_the_exported_mtp_block_is_the_one_of_transformers(tmp_path: Path) -> None:
    """Their class for it reads the names of DeepSeek's checkpoint: `model.layers.N.eh_proj`, ..."""
    from transformers.modeling_layers import MtpLayer  # noqa: PLC0415

    config = CASES["v3 mtp"]
    ours = noisy(config)
    folder = exported(write_run(tmp_path / "run", ours), tmp_path / "folder")
    theirs = from_pretrained(folder)
    block = theirs.model.layers[-1]
    layer = MtpLayer(theirs.config, type(block), type(block.input_layernorm), 2)
    prefix = f"model.layers.{config.num_layers}."
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_folder(folder).items()
        if name.startswith(prefix)
    }
    copies = [found.pop(name) for name in ("embed_tokens.weight", "shared_head.head.weight")]
    assert torch.equal(copies[0], ours.embedding.weight)
    assert torch.equal(copies[1], ours.head.weight)
    experts = [
        torch.cat(
            [found.pop(f"mlp.experts.{e}.{part}.weight") for part in ("gate_proj", "up_proj")]
        )
        for e in range(config.moe.num_experts)
    ]
    found["mlp.experts.gate_up_proj"] = torch.stack(experts)
    down = [found.pop(f"mlp.experts.{e}.down_proj.weight") for e in range(config.moe.num_experts)]
    found["mlp.experts.down_proj"] = torch.stack(down)
    outer = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    layer.load_state_dict(
        {
            "post_norm.weight"
            if name == "shared_head.norm.weight"
            else name
            if name in outer
            else f"mtp_block.{name}": tensor
            for name, tensor in found.items()
        }
    )
    ids = tokens(config)
    positions = torch.arange(SEQUENCE).expand_as(ids)
    hidden: list[Tensor] = []
    ours.norm.register_forward_hook(lambda _, arguments, __: hidden.append(arguments[0]))
    with torch.no_grad():
        wanted = ours(ids, positions, torch.zeros_like(ids)).mtp_logits[0]
        embedding = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        mask = torch.full((SEQUENCE, SEQUENCE), float("-inf")).triu(1)[None, None]
        state = layer(
            theirs.model.embed_tokens(embedding),
            hidden[0],
            position_embeddings=theirs.model.rotary_emb(hidden[0], positions),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        found_logits = theirs.lm_head(state)
    assert relative_error(wanted, found_logits) < 2e-5
