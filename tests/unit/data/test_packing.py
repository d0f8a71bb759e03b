"""Packing, against a batch written by hand."""

import numpy as np
from numpy.typing import NDArray

from data.content import Content, Piece
from data.packing import IGNORED_LABEL, pack


def piece(tokens: NDArray[np.unsignedinteger], start: int, stop: int) -> Piece:
    return Piece(Content(tokens), start, stop, source=0, document=0)


def test_batch_by_hand() -> None:
    a = np.array([10, 11, 12, 0], np.uint16)
    b = np.array([20, 21, 22, 23, 24, 25, 26, 0], np.uint16)
    c = np.array([0], np.uint16)
    batch = pack(
        [
            [piece(a, 1, 4), piece(b, 0, 3)],  # the end of one, the beginning of another
            [piece(b, 3, 8), piece(c, 0, 1)],  # the rest of it, and an empty document
        ],
        6,
    )
    assert batch.input_ids.tolist() == [[11, 12, 0, 20, 21, 22], [23, 24, 25, 26, 0, 0]]
    assert batch.labels.tolist() == [[12, 0, -100, 21, 22, 23], [24, 25, 26, 0, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]


def test_large_token_ids_stay_positive() -> None:
    tokens = np.array([2**32 - 1, 65_535], np.uint32)
    batch = pack([[piece(tokens, 0, 2)]], 2)
    assert batch.input_ids.tolist() == [[2**32 - 1, 65_535]]


def test_padding_is_a_document_of_its_own() -> None:
    batch = pack([[piece(np.array([7, 0], np.uint16), 0, 2)]], 5)
    assert batch.labels.tolist() == [[0, *[IGNORED_LABEL] * 4]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
