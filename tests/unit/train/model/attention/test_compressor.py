import pytest
import torch
from torch import Tensor

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import packed
from train.model.attention.blocks import Blocks, OwnBlocks
from train.model.attention.compressor import Compressor
from train.model.rotary import rotary_tables


def compressor(*, overlap: bool, ratio: int = 4) -> Compressor:
    torch.manual_seed(0)
    module = Compressor(8, 6, ratio, overlap=overlap, eps=1e-6)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def compress(module: Compressor, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    blocks = Blocks.of(positions, documents, len(module.pool.logits))
    part = tokens_of(positions, documents).part
    own = OwnBlocks.of(blocks, part, overlap=module.pool.overlap)
    result: Tensor = module(x, own, rotary_tables(own.at_first(positions), 4, 100.0))
    return result


def test_blocks_end_where_a_document_has_a_multiple_of_the_ratio() -> None:
    _, positions, documents = packed((9, 3, 4, 5), batch=1)
    blocks = Blocks.of(positions, documents, 4)
    # Two blocks of document 0, none of the three tokens of 1, one each of 2 and 3; 21 // 4 places.
    assert blocks.last.tolist() == [[3, 7, 15, 19, 3]]
    assert blocks.documents.tolist() == [[0, 0, 2, 3, -1]]
    assert blocks.follows.tolist() == [[False, True, False, False, False]]
    own = OwnBlocks.of(blocks, tokens_of(positions, documents).part, overlap=False)
    tokens = own.tokens(torch.arange(21.0).view(1, 21, 1))
    assert tokens[0, 2, :, 0].tolist() == [12, 13, 14, 15]
    assert own.at_first(positions)[0, :4].tolist() == [0, 4, 0, 0]


def test_a_query_sees_a_block_from_its_last_token_on() -> None:
    _, positions, documents = packed((9, 3, 4, 5), batch=1)
    hidden = Blocks.of(positions, documents, 4).visibility(documents).hidden(0, 21, 5)[0]
    counts = (~hidden).sum(1)
    assert torch.equal(counts, (positions[0] + 1) // 4)
    assert hidden[:, 4].all()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_entry_is_the_weighted_mean_of_its_slots(overlap: bool) -> None:
    module = compressor(overlap=overlap)
    _, positions, documents = packed((9, 6), batch=1)
    x = torch.randn(1, 15, 8)
    found = compress(module, x, positions, documents)
    kv, gate, logits = module.kv(x)[0], module.gate(x)[0], module.pool.logits
    entries = []
    for start, follows in ((0, False), (4, True), (9, False)):
        own, before = slice(start, start + 4), slice(start - 4, start)
        values, weights = kv[own], gate[own] + logits
        if overlap:
            values, weights = values[:, 6:], weights[:, 6:]
            if follows:
                values = torch.cat([kv[before, :6], values])
                weights = torch.cat([(gate[before] + logits)[:, :6], weights])
        entries.append((weights.softmax(0) * values).sum(0))
    normalised = module.norm(torch.stack(entries))
    torch.testing.assert_close(found[0, :3, :2], normalised[:, :2])
    # The first block of a document is at position 0, where nothing turns.
    torch.testing.assert_close(found[0, [0, 2]], normalised[[0, 2]])
    assert not torch.allclose(found[0, 1, 2:], normalised[1, 2:])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_sequence_shorter_than_a_block_has_no_entries_but_gradients(overlap: bool) -> None:
    module = compressor(overlap=overlap)
    _, positions, documents = packed((3,))
    entries = compress(module, torch.randn(2, 3, 8), positions, documents)
    assert entries.shape == (2, 0, 6)
    entries.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
