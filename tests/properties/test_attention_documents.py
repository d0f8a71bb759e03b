"""V4's attention layers: documents are computed as if alone, and nothing sees what comes later."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokens import tokens_of
from tests.unit.train.model.attention.test_compressed import CONFIG, attention
from tests.unit.train.model.tiny import packed

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
MODULES = [attention(layer) for layer in range(3)]


@pytest.mark.parametrize("layer", range(3))
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_packed_equals_alone(layer: int, lengths: list[int], seed: int) -> None:
    _, positions, documents = packed(tuple(lengths), batch=1)
    x = torch.randn(
        1, sum(lengths), CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        together = MODULES[layer](x, tokens_of(positions, documents))
        end = 0
        for length in lengths:
            part = slice(end, end + length)
            end += length
            alone = MODULES[layer](x[:, part], tokens_of(positions[:, part], documents[:, part]))
            torch.testing.assert_close(alone, together[:, part], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(3))
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), data=st.data())
def test_a_changed_token_moves_nothing_before_it_nor_another_document(
    layer: int, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    _, positions, documents = packed(tuple(lengths), batch=1)
    x = torch.randn(
        1, sum(lengths), CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    place = data.draw(st.integers(0, sum(lengths) - 1))
    changed = x.clone()
    changed[0, place] += 1.0
    with torch.no_grad():
        before = MODULES[layer](x, tokens_of(positions, documents))
        after = MODULES[layer](changed, tokens_of(positions, documents))
    moved = (before != after).any(-1)[0]
    later = (documents[0] == documents[0, place]) & (torch.arange(len(moved)) >= place)
    assert not moved[~later].any()
    assert moved[place]
