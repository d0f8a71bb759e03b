"""Recomputation gives the same bits, and keeps what it says."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.train.model.tiny import FULL, TINY, build, packed
from train.model import hyper_connection
from train.model.attention.config import CompressedConfig, IndexerConfig
from train.model.config import HyperConnectionConfig, ModelConfig, Recompute
from train.model.recompute import segment_length
from train.model.stream_passes import EAGER

DEEP = replace(FULL, num_layers=6, residual="mhc")
SPARSE = replace(DEEP, attention="dsa", indexer=IndexerConfig(num_heads=4, head_dim=8, top_k=3))
NEWER = replace(
    DEEP,
    residual="mhc_single_pass",
    mtp_kind="v4",
    attention="v4_hybrid",
    compressed=CompressedConfig(
        q_lora_rank=24,
        head_dim=16,
        rope_head_dim=4,
        sliding_window=8,
        csa_ratio=4,
        hca_ratio=8,
        compress_ratios=(0, 4, 8, 0, 4, 8, 4),
        output_groups=2,
        output_lora_rank=8,
    ),
    hyper_connection=HyperConnectionConfig(read_out="gated"),
    indexer=IndexerConfig(num_heads=4, head_dim=8, top_k=3),
)


def step(config: ModelConfig, kind: Recompute) -> dict[str, Any]:
    """Loss, gradients, and what was counted in a training step."""
    model = build(config, noise=0.1)
    model.recompute(kind)
    for moe in model.moe_layers():
        moe.balance_scale = 0.5
    for indexer in model.indexers():
        indexer.loss_scale = 0.3
    ids, positions, documents = packed((9, 14, 9))
    output = model(ids, positions, documents)
    loss = sum((x.square().mean() for x in output.mtp_logits), output.logits.square().mean())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"load {i}": moe.take_load_counts() for i, moe in enumerate(model.moe_layers())}
    found |= {f"balance {i}": moe.take_balance_loss() for i, moe in enumerate(model.moe_layers())}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (DEEP, "streams"),
        (DEEP, "full"),
        (NEWER, "full"),
        (SPARSE, "streams"),
        pytest.param(NEWER, "streams", marks=pytest.mark.slow),
        pytest.param(SPARSE, "full", marks=pytest.mark.slow),
        pytest.param(replace(DEEP, residual="hc"), "full", marks=pytest.mark.slow),
        (replace(DEEP, residual="plain"), "full"),
    ],
)
def test_every_gradient_and_count_is_the_same_bitwise(config: ModelConfig, kind: Recompute) -> None:
    wanted, found = step(config, "none"), step(config, kind)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def allocated(model: Any, kind: Recompute) -> int:
    """Bytes of different storages that the graph of a forward pass holds."""
    model.recompute(kind)
    kept: dict[int, int] = {}
    handles: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        handles.append(tensor)
        return tensor

    ids, positions, documents = packed((40, 24))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, positions, documents).logits.sum()
    return sum(kept.values())


def test_less_is_kept() -> None:
    """Of six blocks of four streams: the streams once a segment; or the streams once a block."""
    config = replace(TINY, num_layers=6, residual="mhc")
    model = build(config)
    none, streams, full = (allocated(model, kind) for kind in ("none", "streams", "full"))
    stream = 2 * 64 * 4 * 32 * 4
    segments = math.ceil(6 / segment_length(6, 4))
    assert model.blocks_per_segment is None
    # Hooks see what autograd keeps, and the first streams of a segment are kept beside it. The
    # streams after the last block are kept in all cases, by the read-out.
    assert none - streams == pytest.approx(12 * stream, rel=0.01)
    assert segments == 3
    assert full < 0.35 * none


def test_streams_come_back_once_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site's write runs again once, except a segment's last; no sub-layer runs again."""
    num_writes = 0

    def write(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
        nonlocal num_writes
        num_writes += 1
        return EAGER.write(x, f, post, res)

    monkeypatch.setattr(hyper_connection, "EAGER", replace(EAGER, write=write))
    model = build(replace(TINY, num_layers=6, residual="mhc"))
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model.recompute("streams")
    length = model.blocks_per_segment
    assert length == segment_length(6, 4) == 2
    output = model(*packed((40, 24))).logits
    assert num_writes == 12
    num_calls = len(calls)
    output.sum().backward()
    assert len(calls) == num_calls
    assert num_writes == 12 + 12 - 6 // length


def test_segments_are_freed_in_backward_and_used_once() -> None:
    model = build(replace(TINY, num_layers=2, residual="mhc"))
    model.recompute("streams")
    output = model(*packed((40, 24))).logits.sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        output.backward()


def test_nothing_is_kept_without_gradients() -> None:
    model = build(DEEP)
    model.recompute("streams")
    with torch.no_grad():
        streams = model(*packed((9, 7))).logits
    assert torch.equal(streams, build(DEEP)(*packed((9, 7))).logits)


@pytest.mark.parametrize(("layers", "streams", "length"), [(6, 4, 2), (61, 4, 6), (1, 2, 1)])
def test_length_of_a_segment(layers: int, streams: int, length: int) -> None:
    """The least of `n L / length + (n + 2) length`, found by trying."""
    assert segment_length(layers, streams) == length
    costs = {k: streams * layers / k + (streams + 2) * k for k in range(1, layers + 1)}
    assert costs[length] <= min(costs.values()) * 1.05
