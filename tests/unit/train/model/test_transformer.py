from dataclasses import replace

import pytest
import torch

from tests.unit.train.model.tiny import FULL, TINY, build, packed, relative_error, with_changes
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import (
    CompressedConfig,
    IndexerConfig,
    MlaConfig,
    YarnConfig,
)
from train.model.config import EngramConfig, HyperConnectionConfig, ModelConfig
from train.model.initialize import fill_buffers, parameter_init
from train.model.moe.config import MoeConfig
from train.model.moe.layer import MoeLayer
from train.model.moe.router import HashRouter
from train.model.transformer import Transformer

V41 = with_changes(
    FULL,
    residual="mhc_single_pass",
    hyper_connection=HyperConnectionConfig(read_out="gated"),
    mtp_kind="v4",
    engram=EngramConfig(layers=(1,), ngram_orders=(2, 3, 4), rows_per_head=50, conv_kernel_size=0),
)


def test_the_indexer_starts_with_the_rules_of_its_layers() -> None:
    values = dict(build(with_changes(FULL, attention="dsa")).named_parameters())
    assert (values["layers.0.attention.indexer.k_norm.weight"] == 1).all()
    assert (values["layers.0.attention.indexer.k_norm.bias"] == 0).all()
    assert 0.015 < float(values["layers.0.attention.indexer.q_b.weight"].detach().std()) < 0.025


def hybrid(**changes: object) -> dict[str, object]:
    """Changes that make a model one of V4's hybrid attention."""
    compressed = replace(CompressedConfig(), **changes)  # type: ignore[arg-type]
    return {"attention": "v4_hybrid", "compressed": compressed}


@pytest.mark.parametrize(
    "config",
    [with_changes(FULL, residual=kind) for kind in ("plain", "hc", "mhc")] + [V41],
    ids=["plain", "hc", "mhc", "v4.1"],
)
def test_every_parameter_is_initialised_and_gets_a_gradient(config: ModelConfig) -> None:
    model = build(config, noise=0.05)
    inits = parameter_init(model)
    assert inits.keys() == {name for name, _ in model.named_parameters()}
    output = model(*packed((9, 7)))
    (output.logits.square().mean() + output.mtp_logits[0].square().mean()).backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_hybrid_attention_differs_by_layer() -> None:
    config = with_changes(FULL, **hybrid(), indexer=IndexerConfig(top_k=2))
    model = build(config, noise=0.05)
    kinds = [block.attention for block in model.blocks()]
    assert [kind.ratio for kind in kinds if isinstance(kind, HybridAttention)] == [0, 4, 16, 4]
    assert len(model.indexers()) == 2
    for indexer in model.indexers():
        indexer.loss_scale = 1.0
    output = model(*packed((19, 7)))
    (output.logits.square().mean() + output.mtp_logits[0].square().mean()).backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    values = dict(build(config).named_parameters())
    assert not values["layers.0.attention.sink.logits"].any()
    assert not values["layers.1.attention.compressor.pool.logits"].any()
    # Two sites and the sink; router; pooling; pooling and head weights of the indexer.
    assert [len(group) for group in model.parts().fp32_modules] == [3, 7, 5, 7]


def test_parameter_names_do_not_depend_on_what_else_is_switched_on() -> None:
    names = {name for name, _ in Transformer(TINY).named_parameters()}
    assert names < {name for name, _ in Transformer(FULL).named_parameters()}


def test_parts_cover_the_model() -> None:
    model = Transformer(FULL)
    parts = model.parts()
    assert parts.root is model
    assert list(parts.blocks) == [*model.layers.values(), *model.mtp]
    in_blocks = {id(p) for block in parts.blocks for p in block.parameters()}
    rest = {name for name, p in model.named_parameters() if id(p) not in in_blocks}
    assert rest == {"embedding.weight", "head.weight", "norm.weight"}
    # Two MoE layers and the MTP block; layer 0 is dense and has two sites only.
    assert list(parts.expert_modules) == [moe.experts for moe in model.moe_layers()]
    assert len(list(parts.dispatch_sites)) == 3
    assert [len(group) for group in parts.fp32_modules] == [2, 3, 3, 3]
    # Single-pass mHC of V4.1: the read-outs of the model and of MTP come after the blocks.
    v41 = Transformer(V41)
    assert list(v41.parts().fp32_modules)[4:] == [[v41.read_out], [v41.mtp[0].read_out]]
    plain = Transformer(with_changes(FULL, residual="plain")).parts()
    assert [len(group) for group in plain.fp32_modules] == [1, 1, 1]
    # An indexer adds its norm and the weights of its heads, in the dense block too.
    sparse = Transformer(with_changes(FULL, attention="dsa")).parts()
    assert [len(group) for group in sparse.fp32_modules] == [4, 5, 5, 5]


def test_meta_device_construction_then_values() -> None:
    with torch.device("meta"):
        model = Transformer(FULL)
    inits = parameter_init(model)
    model.to_empty(device="cpu")
    fill_buffers(model)
    reference = build(FULL)
    buffers = dict(reference.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert inits.keys() == {name for name, _ in reference.named_parameters()}
    assert all(init.values is None or not init.values.is_meta for init in inits.values())


def test_one_initial_value_of_each_kind() -> None:
    model = build(FULL)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert (values["layers.0.attention.kv_a_norm.weight"] == 1).all()
    assert 0.018 < float(values["embedding.weight"].std()) < 0.022
    assert 0.018 < float(values["layers.1.ffn.experts.gate_up"].std()) < 0.022
    assert (values["layers.1.engram.table.weight"] == 0).all()
    assert (values["layers.1.engram.conv"] == 0).all()
    bias = values["layers.2.ffn_site.bias"]
    assert bias[:4].sigmoid().tolist() == pytest.approx([0.25] * 4)
    assert torch.equal(bias[8:].view(4, 4), 6 * torch.eye(4))
    hc = dict(build(with_changes(FULL, residual="hc")).named_parameters())
    # The FFN site of layer 2 is the model's site 5.
    assert hc["layers.2.ffn_site.bias"][:4].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("config", [FULL, V41], ids=["v4", "v4.1"])
def test_bf16_model_stays_close_to_fp32(config: ModelConfig) -> None:
    model = build(config, noise=0.02)
    batch = packed((9, 7))
    wanted = model(*batch).logits.detach()
    for module in model.modules():
        if not any(module in group for group in model.parts().fp32_modules):
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(parameter.bfloat16()))
    found = model(*batch).logits.detach()
    assert found.dtype == torch.bfloat16
    assert model.layers["1"].ffn.router.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert relative_error(found.float(), wanted) < 0.05


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"moe": MoeConfig(num_expert_groups=3)}, r"num_expert_groups=3: .*use one of \[1,2,4\]"),
        ({"moe": MoeConfig(num_groups_per_token=2)}, "num_groups_per_token=2: more than"),
        (
            {"moe": MoeConfig(num_experts_per_token=5, num_expert_groups=4)},
            r"hold 2 experts.*use model\.moe\.num_groups_per_token=3",
        ),
        ({"moe": MoeConfig(num_hash_layers=3)}, "num_hash_layers=3: more than the 2 layers"),
        ({"router": "hash", "moe": MoeConfig(num_hash_layers=1)}, "num_hash_layers=1: .*already"),
        ({"router": "hash", "moe": MoeConfig(num_expert_groups=2)}, "token ids knows no groups"),
        ({"mtp_depth": 2}, r"model\.mtp_depth=2: .*use 0 or 1"),
        ({"mla": MlaConfig(qk_rope_head_dim=5)}, r"qk_rope_head_dim=5: .*use 4 or 6"),
        (
            {"mla": MlaConfig(yarn=YarnConfig(factor=1.0))},
            r"model\.mla\.yarn\.factor=1\.0: must be more than 1; .*yarn=null",
        ),
        (
            {"mla": MlaConfig(yarn=YarnConfig(beta_slow=40.0))},
            r"yarn\.beta_slow=40\.0: must be less than model\.mla\.yarn\.beta_fast=32\.0",
        ),
        (
            {"attention": "dsa", "indexer": IndexerConfig(head_dim=2)},
            r"model\.indexer\.head_dim=2: must hold .*qk_rope_head_dim=4 .*use 4 or more",
        ),
        ({"moe": MoeConfig(num_experts=2, num_experts_per_token=3)}, "num_experts_per_token=3"),
        ({"hyper_connection": HyperConnectionConfig(num_streams=1)}, "num_streams=1: at least 2"),
        ({"engram": EngramConfig(layers=(1, 9))}, r"layers=\[1,9\]: .*from 0 to 2"),
        ({"engram": EngramConfig(ngram_orders=(2, 4))}, r"\[2,4\]: .*use \[2\], \[2,3\]"),
        ({"engram": EngramConfig(pad_token_id=64)}, "pad_token_id=64: .*vocab_size=64"),
        (hybrid(compress_ratios=(0, 4)), r"ratios=\[0,4\]: .*0, 4, 16 .*example \[0,4,16\]"),
        (hybrid(compress_ratios=(0, 4, 128)), r"\[0,4,128\]: .*one of 0, 4, 16"),
        (hybrid(hca_ratio=4), "hca_ratio=4: must differ from csa_ratio"),
        (hybrid(rope_head_dim=15), "rope_head_dim=15: must be even and at most .*head_dim=64"),
        (hybrid(rope_head_dim=48), "rope_head_dim=48: .*at most model.indexer.head_dim=32"),
        (hybrid(output_groups=3), "output_groups=3: must divide .*heads=2; use 1, 2"),
        (hybrid(yarn=YarnConfig(factor=1.0)), "compressed.yarn.factor=1.0: must be more than 1"),
        (hybrid(yarn=YarnConfig(mscale=0.5)), "mscale=0.5: .*use .*=1.0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Transformer(with_changes(TINY, **changes))


def test_all_violations_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)qk_rope_head_dim=5.*mtp_depth=5"):
        Transformer(with_changes(TINY, mla=MlaConfig(qk_rope_head_dim=5), mtp_depth=5))


@pytest.mark.parametrize(
    ("router", "hash_layers", "hashed"),
    [("sigmoid", 0, []), ("sqrtsoftplus", 1, [1]), ("hash", 0, [1, 2, 3])],
)
def test_the_first_moe_layers_or_all_route_by_token_id(
    router: str, hash_layers: int, hashed: list[int]
) -> None:
    moe = MoeConfig(num_experts=4, num_hash_layers=hash_layers)
    model = build(with_changes(FULL, router=router, moe=moe))
    found = [i for i, layer in enumerate(model.moe_layers(), 1) if layer.expert_bias is None]
    assert found == hashed  # the last is that of MTP
    ids, positions, documents = packed((5, 7))
    before = model(ids, positions, documents)
    torch.autograd.backward(before.logits.sum() + before.mtp_logits[0].sum())
    for layer in model.moe_layers():
        counts = layer.take_load_counts()
        if isinstance(layer.router, HashRouter) and layer is not model.moe_layers()[-1]:
            wanted = torch.bincount(layer.router.expert_table[ids].flatten(), minlength=4)
            assert counts.tolist() == wanted.tolist()
        layer.router.update_bias(counts)
        assert (layer.expert_bias is None) or layer.expert_bias.any()


def test_moe_layers_are_those_after_the_dense_ones() -> None:
    model = Transformer(with_changes(TINY, num_dense_layers=2, mtp_depth=1))
    assert not isinstance(model.layers["1"].ffn, MoeLayer)
    assert len(model.moe_layers()) == 2
