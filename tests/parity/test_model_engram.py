"""Engram against an implementation that is not ours: the n-gram layer (PLE) of transformers' Qwen4.

Same: hashing by multiply and XOR, the prime moduli, look-back that stops between documents, signed
square-root gate, keys per stream, one value, dilated convolution. Different, and bridged below:
their norm weights are offsets from 1; multipliers come from splitmix64 instead of numpy; the
end-of-document token is the pad, and no vocabulary is compressed; the convolution runs on across
documents, so a single document is compared.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import relative_error
from train.model.config import EngramConfig
from train.model.engram import Engram
from train.model.engram_hash import NgramHash, hash_geometries

EOS, VOCAB, HIDDEN, STREAMS = 1, 64, 16, 4
OURS = EngramConfig(
    layers=(0, 1),
    ngram_orders=(2, 3),
    num_heads=3,
    rows_per_head=101,
    head_dim=8,
    pad_token_id=EOS,
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def their_layer(index: int) -> Any:
    from transformers.models.qwen4_exp import modeling_qwen4_exp  # noqa: PLC0415

    config = SimpleNamespace(
        hidden_size=HIDDEN,
        hc_count=STREAMS,
        ple_embed_dim=2 * 3 * 8,
        ple_conv_kernel_size=4,
        ngram_size=3,
        heads_per_ngram=3,
        vocab_size=VOCAB,
        ngram_vocab_size_base=101,
        make_ngram_vocab_size_divisible_by=1,
        seed=0,
        eos_token_id=EOS,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(index)
    layer = modeling_qwen4_exp.Qwen4ExpTextPLELayer(config, index, index)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("index", [0, 1])
def test_rows_equal_transformers(index: int) -> None:
    theirs = their_layer(index).ple_embedding
    geometry = hash_geometries(OURS)[index]
    assert [size for heads in geometry.moduli for size in heads] == theirs.head_vocab_sizes
    assert geometry.offsets == theirs.head_offsets
    ours = NgramHash(OURS, geometry, VOCAB)
    ours.multipliers.copy_(theirs.layer_multipliers)
    ids = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = EOS
    # A document ends with its end-of-document token.
    ended = (ids == EOS).long()
    documents = ended.cumsum(1) - ended
    with torch.no_grad():
        found = nn.functional.embedding(ours(ids, documents), theirs.ngram_embedding.weight)
        assert torch.equal(found.flatten(2), theirs(ids, None))


def test_gate_convolution_and_gradients_equal_transformers() -> None:
    theirs = their_layer(0)
    geometry = hash_geometries(OURS)[0]
    ours = Engram(OURS, geometry, vocab_size=VOCAB, hidden_size=HIDDEN, streams=STREAMS, eps=1e-6)
    ours.hash.multipliers.copy_(theirs.ple_embedding.layer_multipliers)
    assert ours.table is not None
    assert ours.conv is not None
    assert ours.conv_norm is not None
    with torch.no_grad():
        ours.table.weight.copy_(theirs.ple_embedding.ngram_embedding.weight)
        ours.key.weight.copy_(theirs.key_proj.weight)
        ours.value.weight.copy_(theirs.value_proj.weight)
        for weight, norm in (
            (ours.key_norm, theirs.norm_key),
            (ours.query_norm, theirs.norm_query),
            (ours.conv_norm, theirs.norm_conv),
        ):
            weight.copy_(1 + norm.weight.view(STREAMS, HIDDEN))
        # Their last tap is the token itself.
        ours.conv.copy_(theirs.conv1d.weight[:, 0].T.flip(0).reshape(ours.conv.shape))

    ids = torch.randint(2, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    stream = torch.randn(2, 30, STREAMS, HIDDEN, requires_grad=True)
    found = ours(stream, tokens_of(ids * 0, ids * 0, ids)) - stream
    wanted = theirs(stream.flatten(2), ids, None).view_as(stream)
    assert relative_error(found, wanted) < 2e-5
    direction = torch.randn_like(found)
    mine = torch.autograd.grad(
        found, (stream, ours.table.weight, ours.key.weight, ours.value.weight), direction
    )
    reference = torch.autograd.grad(
        wanted,
        (
            stream,
            theirs.ple_embedding.ngram_embedding.weight,
            theirs.key_proj.weight,
            theirs.value_proj.weight,
        ),
        direction,
    )
    for left, right in zip(mine, reference, strict=True):
        assert relative_error(left, right) < 2e-5
