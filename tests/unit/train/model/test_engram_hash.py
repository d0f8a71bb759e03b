from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.train.model.tiny import MEMORY
from train.model.config import EngramConfig
from train.model.engram_hash import (
    NgramHash,
    compress_vocabulary,
    hash_geometries,
    hash_multipliers,
)


def test_golden_values_of_v41() -> None:
    """Published constants of DeepSeek-V4.1-Flash: table sizes are in its config.json."""
    config = EngramConfig(
        layers=(1, 14), ngram_orders=(2, 3, 4), num_heads=8, rows_per_head=16_000_000, seed=0
    )
    found = hash_geometries(config)
    assert found[1].num_rows == 384006168
    assert found[14].num_rows == 384016682
    assert found[1].moduli[0][:3] == (16000057, 16000079, 16000081)
    assert found[14].moduli[2][-3:] == (16000877, 16000879, 16000889)
    ngrams = {layer: NgramHash(config, geometry, 129280) for layer, geometry in found.items()}
    for module in ngrams.values():
        module.set_token_map(torch.arange(129280) % 99092)
    assert tuple(ngrams[1].multipliers.tolist()) == (
        76632096046245,
        4839876093313,
        35959672319349,
        73987337458391,
    )
    assert tuple(ngrams[14].multipliers.tolist()) == (
        67716810739261,
        51510806800915,
        30921347202721,
        82619226485591,
    )


def loop_rows(
    config: EngramConfig, layer: int, vocab: int, tokens: list[int], starts: list[int]
) -> list[list[int]]:
    """The published algorithm with Python's integers, token by token."""
    geometry = hash_geometries(config)[layer]
    multipliers = hash_multipliers(config, layer, vocab)
    rows = []
    for place in range(len(tokens)):
        start = max(s for s in starts if s <= place)
        columns, offset = [], 0
        for order, heads in zip(config.ngram_orders, geometry.moduli, strict=True):
            mix = 0
            for back in range(order):
                token = tokens[place - back] if place - back >= start else config.pad_token_id
                mix ^= token * multipliers[back]
            for modulus in heads:
                columns.append(mix % modulus + offset)
                offset += modulus
        rows.append(columns)
    return rows


@pytest.mark.parametrize("orders", [(2,), (2, 3), (2, 3, 4)])
def test_rows_equal_exact_integer_arithmetic_within_documents(orders: tuple[int, ...]) -> None:
    config = replace(MEMORY, ngram_orders=orders, layers=(0, 3), num_heads=3)
    vocab = 129280
    tokens = np.random.default_rng(0).integers(0, vocab, 12).tolist()
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6])
    for layer, geometry in hash_geometries(config).items():
        rows = NgramHash(config, geometry, vocab)(torch.tensor([tokens]), documents)
        assert rows[0].tolist() == loop_rows(config, layer, vocab, tokens, [0, 5, 6])
        assert int(rows.max()) < geometry.num_rows


def test_tokens_that_compress_to_one_id_share_rows() -> None:
    geometry = hash_geometries(MEMORY)[1]
    ngrams = NgramHash(MEMORY, geometry, 6)
    documents = torch.zeros(1, 3, dtype=torch.int64)
    first, second = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 4, 5]])
    assert not torch.equal(ngrams(first, documents), ngrams(second, documents))
    ngrams.set_token_map(torch.tensor([0, 1, 2, 0]))
    assert torch.equal(ngrams(first, documents), ngrams(second, documents))
    with pytest.raises(ValueError, match=r"model\.vocab_size=6: the tokenizer has 7"):
        ngrams.set_token_map(torch.arange(7))


def test_one_token_sequences_see_only_padding() -> None:
    ngrams = NgramHash(MEMORY, hash_geometries(MEMORY)[1], 64)
    rows = ngrams(torch.tensor([[9]]), torch.tensor([[0]]))
    assert rows[0].tolist() == loop_rows(MEMORY, 1, 64, [9], [0])


def test_vocabulary_compression() -> None:
    tokens = [
        "Apple",
        " apple",
        "APPLE",
        "\uff41\uff50\uff50\uff4c\uff45",
        "\u00e4",
        "a\u0308",
        "A",
        " ",
        "\n",
        "  ",
        "",
        "\ufffd",
        "\ufffdA",
        "\u03a3",
    ]
    # White space of any kind is one lone space; nothing at all and invalid text stay themselves.
    assert compress_vocabulary(tokens).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5, 6]
    assert compress_vocabulary(["x", "y", "X"]).tolist() == [0, 1, 0]
