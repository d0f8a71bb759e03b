"""Engram's row numbers are in range, and depend on nothing but the tokens behind in the document."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.train.model.tiny import MEMORY
from train.model.config import EngramConfig
from train.model.engram_hash import NgramHash, hash_geometries

VOCAB, DEAD = 97, 96
CONFIGS: dict[tuple[int, ...], EngramConfig] = {
    orders: replace(MEMORY, ngram_orders=orders, num_heads=3)
    for orders in ((2,), (2, 3), (2, 3, 4))
}
HASHES = {
    (orders, dead): NgramHash(config, hash_geometries(config)[1], VOCAB, dead)
    for orders, config in CONFIGS.items()
    for dead in (None, DEAD)
}
ORDERS = st.sampled_from(list(CONFIGS))
DEAD_ID = st.sampled_from([None, DEAD])
# Few different tokens, so that dead ones and repetitions are common.
TOKENS = st.lists(st.sampled_from([0, 1, 2, 7, 95, DEAD]), min_size=1, max_size=24)


def one_document(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([tokens])
    return ids, torch.zeros_like(ids)


@settings(max_examples=60, deadline=None)
@given(orders=ORDERS, dead=DEAD_ID, tokens=TOKENS)
def test_every_head_reads_its_own_rows(
    orders: tuple[int, ...], dead: int | None, tokens: list[int]
) -> None:
    ngrams = HASHES[orders, dead]
    rows = ngrams(*one_document(tokens))
    offsets = torch.tensor(ngrams.geometry.offsets)
    sizes = torch.tensor([size for heads in ngrams.geometry.moduli for size in heads])
    assert ((rows >= offsets) & (rows < offsets + sizes)).all()


@settings(max_examples=60, deadline=None)
@given(orders=ORDERS, dead=DEAD_ID, documents=st.lists(TOKENS, min_size=1, max_size=4))
def test_packing_and_batch_splits_change_nothing(
    orders: tuple[int, ...], dead: int | None, documents: list[list[int]]
) -> None:
    ngrams = HASHES[orders, dead]
    alone = torch.cat([ngrams(*one_document(tokens))[0] for tokens in documents])
    ids = torch.tensor([token for tokens in documents for token in tokens])
    lengths = torch.tensor([len(tokens) for tokens in documents])
    numbers = torch.arange(len(documents)).repeat_interleave(lengths)
    # Twice the same sequence as a batch, whole and split.
    batch = [torch.stack([part, part]) for part in (ids, numbers)]
    together = ngrams(*batch)
    assert torch.equal(together, torch.stack([alone, alone]))
    assert torch.equal(ngrams(*(part[1:] for part in batch)), together[1:])


@settings(max_examples=60, deadline=None)
@given(orders=ORDERS, tokens=TOKENS)
def test_look_back_stops_at_dead_tokens(orders: tuple[int, ...], tokens: list[int]) -> None:
    """The live tokens after a dead one read what they would read at the start of a document."""
    ngrams = HASHES[orders, DEAD]
    rows = ngrams(*one_document(tokens))[0]
    pads = ngrams(*one_document([MEMORY.pad_token_id]))[0, 0]
    run: list[int] = []
    for place, token in enumerate(tokens):
        run = [] if token == DEAD else [*run, token]
        wanted = HASHES[orders, None](*one_document(run))[0, -1] if run else pads
        assert torch.equal(rows[place], wanted)
