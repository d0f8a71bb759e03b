from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import FULL, MEMORY, build, packed, with_changes
from train.model.engram import Engram, causal_depthwise_conv, memory_rows
from train.model.engram_hash import hash_geometries


def memory(streams: int) -> Engram:
    torch.manual_seed(0)
    made = Engram(
        MEMORY,
        hash_geometries(MEMORY)[1],
        vocab_size=64,
        hidden_size=6,
        streams=streams,
        eps=1e-6,
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt()


@pytest.mark.parametrize("streams", [1, 3])
def test_equals_the_released_formula_on_one_document(streams: int) -> None:
    made = memory(streams)
    ids, _, documents = packed((9,), batch=1)
    stream = torch.randn(1, 9, streams, 6)
    found = made(stream, tokens_of(documents, documents, ids))

    rows = made.hash(ids, documents)
    assert made.table is not None
    embedded = made.table.weight[rows].flatten(2)
    update = torch.zeros(9, streams, 6)
    gates = []
    for t in range(9):
        for m in range(streams):
            key = made.key.weight.view(streams, 6, -1)[m] @ embedded[0, t]
            score = (
                rms(stream[0, t, m]) * made.query_norm[m] * rms(key) * made.key_norm[m]
            ).sum() / 6**0.5
            gate = torch.sigmoid(score.sign() * score.abs().sqrt())
            gates.append(float(gate.detach()))
            update[t, m] = gate * (made.value.weight @ embedded[0, t])
    assert made.conv is not None
    assert made.conv_norm is not None
    normalised = torch.stack([torch.stack([rms(x) for x in token]) for token in update])
    channels = (normalised * made.conv_norm).reshape(9, -1).T[None]
    # torch's convolution has the token itself at the last tap.
    taps = made.conv.flip(0).reshape(4, -1).T[:, None]
    conv = F.conv1d(F.pad(channels, (9, 0)), taps, groups=streams * 6, dilation=3)
    wanted = stream[0] + update + F.silu(conv)[0].T.view(9, streams, 6)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
    total, number = made.take_gates().tolist()
    assert (total, number) == (pytest.approx(sum(gates), rel=1e-5), len(gates))
    assert made.take_gates().tolist() == [0, 0]


def test_convolution_stops_at_documents_and_has_exact_gradients() -> None:
    x = torch.randn(1, 11, 2, 3, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[0] * 4 + [1] * 7])
    whole = causal_depthwise_conv(x, taps, documents, 2)
    parts = [
        causal_depthwise_conv(part, taps, torch.zeros(1, part.shape[1], dtype=torch.int64), 2)
        for part in torch.split(x, [4, 7], dim=1)
    ]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))
    assert torch.autograd.gradcheck(
        lambda x, taps: causal_depthwise_conv(x, taps, documents, 2), (x, taps)
    )


def test_model_with_memory_starts_as_the_model_without() -> None:
    batch = packed((5, 7))
    with_memory, without = build(FULL), build(with_changes(FULL, engram=None))
    values = dict(with_memory.named_parameters())
    assert all(torch.equal(values[name], p) for name, p in without.named_parameters())
    output, wanted = with_memory(*batch), without(*batch)
    assert torch.equal(output.logits, wanted.logits)
    assert torch.equal(output.mtp_logits[0], wanted.mtp_logits[0])


def test_injected_lookup_replaces_the_table() -> None:
    made = memory(2)
    ids, _, documents = packed((6,))
    stream = torch.randn(2, 6, 2, 6)
    wanted = made(stream, tokens_of(documents, documents, ids))
    assert made.table is not None
    elsewhere, made.table = made.table.weight.detach(), None
    made.lookup = lambda tokens: elsewhere[memory_rows(made.hash, tokens)]
    assert torch.equal(made(stream, tokens_of(documents, documents, ids)), wanted)


def test_zero_table_learns_from_the_first_step_and_only_where_it_was_read() -> None:
    model = build(FULL)
    batch = packed((5, 7))
    model(*batch).logits.square().sum().backward()
    engram = model.engram_layers()[1]
    assert engram.table is not None
    grad = engram.table.weight.grad
    assert grad is not None
    assert grad.isfinite().all()
    read = torch.zeros(len(grad), dtype=torch.bool)
    read[engram.hash(batch[0], batch[2]).flatten()] = True
    assert torch.equal(grad.any(1), read)


def test_without_convolution_the_gated_value_is_all() -> None:
    """V4.1: `conv_kernel_size: 0`. With taps of 0 the convolution adds nothing either."""
    with_taps = memory(3)
    assert with_taps.conv is not None
    torch.nn.init.zeros_(with_taps.conv)
    without = Engram(
        replace(MEMORY, conv_kernel_size=0),
        hash_geometries(MEMORY)[1],
        vocab_size=64,
        hidden_size=6,
        streams=3,
        eps=1e-6,
    )
    assert {name for name, _ in without.named_parameters() if "conv" in name} == set()
    without.load_state_dict(with_taps.state_dict(), strict=False)
    ids, _, documents = packed((4, 5))
    stream = torch.randn(2, 9, 3, 6)
    tokens = tokens_of(documents, documents, ids)
    assert torch.equal(without(stream, tokens), with_taps(stream, tokens))


def test_dead_tokens_separate_what_stands_on_their_sides() -> None:
    torch.manual_seed(0)
    made = Engram(
        replace(MEMORY, conv_kernel_size=0),
        hash_geometries(MEMORY)[1],
        vocab_size=64,
        hidden_size=6,
        streams=2,
        eps=1e-6,
        dead_token_id=63,
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 63, 63, 7, 8], [9, 6, 63, 63, 7, 8]])
    stream = torch.randn(1, 6, 2, 6).expand(2, -1, -1, -1)
    first, second = made(stream, tokens_of(ids * 0, ids * 0, ids))
    assert torch.equal(first[2:], second[2:])
    assert not torch.equal(first[1], second[1])
