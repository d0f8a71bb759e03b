"""Which weights tensor parallelism cuts, and which sizes it refuses."""

import re
from dataclasses import replace

import pytest
import torch

from tests.unit.train.model.tiny import FULL, with_changes
from train.model.attention.config import AttentionKind, CompressedConfig, IndexerConfig, MlaConfig
from train.model.config import ModelConfig
from train.model.rules import tensor_parallel_violations
from train.model.transformer import Transformer

HYBRID = CompressedConfig(
    compress_ratios=(0, 4, 16, 4), head_dim=16, rope_head_dim=8, output_groups=2
)
COLUMNS = {
    "mla": {"q_b.weight", "kv_b.weight"},
    "dsa": {"q_b.weight", "kv_b.weight"},
    "v4_hybrid": {"q_b.weight", "o_a.weight", "sink.logits"},
}
ROWS = {"mla": "o.weight", "dsa": "o.weight", "v4_hybrid": "o_b.weight"}


def model_of(attention: AttentionKind, config: ModelConfig = FULL) -> Transformer:
    with torch.device("meta"):
        return Transformer(
            replace(
                config,
                attention=attention,
                compressed=HYBRID,
                indexer=IndexerConfig(num_heads=2, head_dim=16, top_k=2),
            )
        )


def cut(model: Transformer, dim: int) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = (model.parts().column_parallel, model.parts().row_parallel)[dim]
    found = [names[id(p)] for module in modules for p in module.parameters(recurse=False)]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("attention", ["mla", "dsa", "v4_hybrid"])
def test_heads_channels_and_vocabulary_are_cut_and_nothing_else(attention: AttentionKind) -> None:
    model = model_of(attention)
    places = ["layers.0", "layers.1", "layers.2", "mtp.0.block"]
    columns = {f"{place}.attention.{name}" for place in places for name in COLUMNS[attention]}
    columns |= {"embedding.weight", "head.weight"}
    assert cut(model, 0) == columns | {"layers.0.ffn.gate.weight", "layers.0.ffn.up.weight"}
    rows = {f"{place}.attention.{ROWS[attention]}" for place in places}
    assert cut(model, 1) == rows | {"layers.0.ffn.down.weight"}


def test_queries_without_a_latent_are_cut() -> None:
    mla = MlaConfig(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4)
    found = cut(model_of("mla", replace(FULL, mla=mla)), 0)
    assert "layers.1.attention.q.weight" in found


@pytest.mark.parametrize(
    ("changes", "size", "problem"),
    [
        ({}, 2, None),
        ({}, 1, None),
        (
            {"num_attention_heads": 6},
            4,
            "parallel.tensor_parallel_size=4: must divide model.num_attention_heads=6; use 1, 2, 3 "
            "or 6",
        ),
        (
            {"num_attention_heads": 8, "attention": "v4_hybrid"},
            4,
            "parallel.tensor_parallel_size=4: must divide model.num_attention_heads=8 and "
            "model.compressed.output_groups=2; use 1 or 2",
        ),
        (
            {"vocab_size": 65},
            2,
            "model.vocab_size=65: must be a multiple of parallel.tensor_parallel_size=2; use 64 or "
            "66",
        ),
        (
            {"intermediate_size": 1},
            2,
            "model.intermediate_size=1: must be a multiple of parallel.tensor_parallel_size=2; use 2",
        ),
        ({"intermediate_size": 1, "num_dense_layers": 0}, 2, None),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    changes: dict[str, object], size: int, problem: str | None
) -> None:
    config = with_changes(FULL, compressed=HYBRID, **changes)
    assert tensor_parallel_violations(config, size) == ([problem] if problem else [])


def test_all_problems_come_at_once_and_every_fix_works() -> None:
    config = with_changes(FULL, num_attention_heads=6, vocab_size=65, intermediate_size=50)
    found = tensor_parallel_violations(config, 4)
    paths = [line.split("=")[0] for line in found]
    assert paths == [
        "parallel.tensor_parallel_size",
        "model.vocab_size",
        "model.intermediate_size",
    ]
    for line, path in zip(found, paths, strict=True):
        for fix in re.findall(r"\d+", line.rpartition("; use ")[2]):
            name = path.rpartition(".")[2]
            size = int(fix) if name == "tensor_parallel_size" else 4
            changed = {} if name == "tensor_parallel_size" else {name: int(fix)}
            left = tensor_parallel_violations(with_changes(config, **changed), size)
            assert not any(other.startswith(f"{path}=") for other in left)
