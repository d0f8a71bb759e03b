"""V4's three kinds of attention layers against transformers', with the same random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, relative_error
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import CompressedConfig, IndexerConfig, YarnConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KINDS = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    16: "heavily_compressed_attention",
}
CONFIG = replace(
    TINY,
    attention="v4_hybrid",
    num_attention_heads=4,
    compressed=CompressedConfig(
        compress_ratios=tuple(KINDS),
        sliding_window=24,
        q_lora_rank=24,
        head_dim=16,
        rope_head_dim=8,
        output_groups=2,
        output_lora_rank=12,
    ),
    indexer=IndexerConfig(num_heads=16, head_dim=12, top_k=6),
)
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=32)
NAMES = {
    "q_a_proj.weight": "q_a.weight",
    "q_a_norm.weight": "q_a_norm.weight",
    "q_b_proj.weight": "q_b.weight",
    "kv_proj.weight": "kv.weight",
    "kv_norm.weight": "kv_norm.weight",
    "o_a_proj.weight": "o_a.weight",
    "o_b_proj.weight": "o_b.weight",
    "sinks": "sink.logits",
    "position_bias": "pool.logits",
    "gate_proj.weight": "gate.weight",
    "scorer.weights_proj.weight": "head_weights.weight",
}


def our_name(name: str) -> str:
    """Theirs has the indexer within the compressor, and the indexer's compressor in the indexer."""
    own = name.removeprefix("compressor.").removeprefix("indexer.")
    prefix = ""
    if "indexer." in name:
        within = own.startswith(("kv_", "gate_", "position_"))
        prefix = "indexer.compressor." if within else "indexer."
    elif name.startswith("compressor."):
        prefix = "compressor."
    found = NAMES[own]
    return prefix + (found.removeprefix("kv_") if prefix and own == "kv_norm.weight" else found)


def theirs_config(yarn: YarnConfig | None) -> Any:
    from transformers import DeepseekV4Config  # noqa: PLC0415

    v4, indexer = CONFIG.compressed, CONFIG.indexer
    scaling = yarn and {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    return DeepseekV4Config(
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=len(KINDS),
        num_attention_heads=CONFIG.num_attention_heads,
        head_dim=v4.head_dim,
        qk_rope_head_dim=v4.rope_head_dim,
        q_lora_rank=v4.q_lora_rank,
        layer_types=list(KINDS.values()),
        compress_rates={KINDS[4]: 4, KINDS[16]: 16},
        sliding_window=v4.sliding_window,
        o_groups=v4.output_groups,
        o_lora_rank=v4.output_lora_rank,
        index_n_heads=indexer.num_heads,
        index_head_dim=indexer.head_dim,
        index_topk=indexer.top_k,
        rms_norm_eps=CONFIG.rms_norm_eps,
        rope_theta=v4.rope_theta,
        compress_rope_theta=v4.compress_rope_theta,
        rope_parameters=scaling,
        attn_implementation="eager",
    )


def both(ratio: int, yarn: YarnConfig | None) -> tuple[HybridAttention, nn.Module, nn.Module]:
    """Ours, theirs and their rotary embedding; every parameter is random."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4  # noqa: PLC0415

    torch.manual_seed(0)
    layer, config = list(KINDS).index(ratio), theirs_config(yarn)
    theirs: nn.Module = v4.DeepseekV4Attention(config, layer)
    ours = HybridAttention(replace(CONFIG, compressed=replace(CONFIG.compressed, yarn=yarn)), layer)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            nn.init.normal_(parameter, std=0.3)
            mine.pop(our_name(name)).copy_(parameter)
    assert not mine
    return ours, theirs, v4.DeepseekV4RotaryEmbedding(config)


def run_theirs(theirs: nn.Module, rotary: nn.Module, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    distance = positions[0, :, None] - positions[0]
    seen = (distance >= 0) & (distance < CONFIG.compressed.sliding_window)
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).expand(len(x), 1, -1, -1)
    tables = {
        kind: rotary(x, position_ids=positions, layer_type=kind) for kind in ("main", "compress")
    }
    output: Tensor = theirs(x, tables, positions, mask)[0]
    return output


@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("ratio", KINDS)
def test_outputs_and_gradients_equal_transformers(ratio: int, yarn: YarnConfig | None) -> None:
    ours, theirs, rotary = both(ratio, yarn)
    # 37 blocks of CSA, of which 6 are selected, and a tail; 9 of HCA.
    x = torch.randn(2, 150, CONFIG.hidden_size, requires_grad=True)
    positions = torch.arange(150).expand(2, 150)
    found = ours(x, tokens_of(positions, positions * 0))
    wanted = run_theirs(theirs, rotary, x)
    assert relative_error(found, wanted) < 2e-5

    direction = torch.randn_like(wanted)
    # Theirs does not train the indexer; ours does, and with no scale set its gradient is 0.
    names = [name for name, _ in theirs.named_parameters() if "indexer" not in name]
    mine, reference = dict(ours.named_parameters()), dict(theirs.named_parameters())
    my_grads = torch.autograd.grad(found, [x, *(mine[our_name(n)] for n in names)], direction)
    grads = torch.autograd.grad(wanted, [x, *(reference[n] for n in names)], direction)
    for name, grad, other in zip(["x", *names], my_grads, grads, strict=True):
        assert relative_error(grad, other) < 2e-5, name
