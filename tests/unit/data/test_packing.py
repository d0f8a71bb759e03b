"""Packing, against batches written by hand."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.content import Content, Picture, Piece
from data.faults import Fault
from data.packing import Batch, PackingRules, join, pack
from data.pictures import VisionGeometry

EYE = 9
VISION = VisionGeometry(
    placeholder_token_id=EYE, patch_size=1, frames_per_patch=1, spatial_merge=1, channels=1
)


def rules(length: int, vision: VisionGeometry | None = None) -> PackingRules:
    return PackingRules(sequence_length=length, padding_id=1, num_sources=2, vision=vision)


def piece(tokens: NDArray[np.unsignedinteger], start: int, stop: int, source: int = 0) -> Piece:
    return Piece(Content(tokens), start, stop, source, 0)


A = np.array([10, 11, 12, 0], np.uint16)
B = np.array([20, 21, 22, 23, 24, 25, 26, 0], np.uint16)
C = np.array([0], np.uint16)


def test_batch_by_hand() -> None:
    batch = pack(
        [
            [piece(A, 1, 4), piece(B, 0, 3)],  # the end of one, the beginning of another
            [piece(B, 3, 8), piece(C, 0, 1, source=1)],  # the rest of it, and an empty document
        ],
        rules(6),
    )
    assert batch.input_ids.tolist() == [[11, 12, 0, 20, 21, 22], [23, 24, 25, 26, 0, 0]]
    assert batch.labels.tolist() == [[12, 0, -100, 21, 22, 23], [24, 25, 26, 0, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert batch.vision is None
    assert batch.source_tokens == (11, 1)
    assert batch.packing_efficiency == 1.0


def test_padding_by_hand() -> None:
    batch = pack([[piece(A, 0, 4), piece(C, 0, 1)], [piece(B, 0, 3, source=1)]], rules(7))
    assert batch.input_ids.tolist() == [[10, 11, 12, 0, 0, 1, 1], [20, 21, 22, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [
        [11, 12, 0, -100, -100, -100, -100],
        [21, 22, 23, -100, -100, -100, -100],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1]]
    assert batch.source_tokens == (5, 3)
    assert batch.packing_efficiency == 8 / 14


def pictures() -> Content:
    """Text, 1 x 1 x 3 rows, text, 1 x 2 x 1 rows, text."""
    tokens = np.array([10, EYE, EYE, EYE, 11, 12, EYE, EYE, 13, 0], np.uint16)
    values = np.arange(5, dtype=np.uint8)[:, None]
    wide = Picture(1, (1, 1, 3), (1, 1, 3), values[:3])
    high = Picture(6, (1, 2, 1), (1, 2, 1), values[3:])
    return Content(tokens, (wide, high))


def test_pictures_by_hand() -> None:
    content = pictures()
    first, rest = Piece(content, 0, 5, 0, 0), Piece(content, 5, 10, 0, 0)
    batch = pack([[first], [piece(C, 0, 1), rest], [piece(A, 0, 2)]], rules(6, VISION))
    assert batch.vision is not None
    assert batch.labels.tolist() == [
        [-100, -100, -100, 11, 12, -100],
        [-100, -100, -100, 13, 0, -100],
        [11, 12, -100, -100, -100, -100],
    ]
    assert batch.vision.patches.flatten().tolist() == [0, 1, 2, 3, 4]
    assert batch.vision.grids.tolist() == [[1, 1, 3], [1, 2, 1]]
    assert batch.vision.images_per_sequence.tolist() == [1, 1, 0]
    rope = batch.vision.rope_positions
    assert rope[0].tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [1, 1, 3], [4] * 3, [0] * 3]
    # The second piece counts from 0 again: 12, the picture, 13, 0.
    assert rope[1].tolist() == [[0] * 3, [0] * 3, [1, 1, 1], [1, 2, 1], [3] * 3, [4] * 3]
    assert rope[2, :, 0].tolist() == [0, 1, 0, 1, 2, 3]


def test_a_batch_without_pictures_has_none_of_their_patches() -> None:
    batch = pack([[piece(A, 0, 4)]], rules(4, VISION))
    assert batch.vision is not None
    assert batch.vision.patches.shape == (0, 1)
    assert batch.vision.grids.shape == (0, 3)


@pytest.mark.parametrize("vision", [None, VISION])
def test_joined_parts_are_the_whole(vision: VisionGeometry | None) -> None:
    content = pictures() if vision else Content(np.append(B, B).astype(np.uint16))
    sequences = [
        [Piece(content, 0, 5, 0, 0)],
        [piece(C, 0, 1, source=1), Piece(content, 5, 10, 0, 0)],
        [piece(A, 0, 2)],
    ]
    faults = tuple(
        Fault("docs", "shard-000000.tar", str(n), "checksum", "flipped") for n in range(3)
    )
    whole = pack(sequences, rules(6, vision), faults)
    parts = [
        pack(sequences[:1], rules(6, vision), faults[:1]),
        pack(sequences[1:], rules(6, vision), faults[1:]),
    ]
    assert_equal(join(parts), whole)
    assert join([whole]) is whole


def assert_equal(mine: Batch, theirs: Batch) -> None:
    assert (mine.source_tokens, mine.faults) == (theirs.source_tokens, theirs.faults)
    assert (mine.vision is None) == (theirs.vision is None)
    for part, other in [(mine, theirs), (mine.vision, theirs.vision)]:
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)), name


def test_large_token_ids_stay_positive() -> None:
    tokens = np.array([2**32 - 1, 65_535], np.uint32)
    batch = pack([[piece(tokens, 0, 2)]], rules(2))
    assert batch.input_ids.tolist() == [[2**32 - 1, 65_535]]


def test_pieces_must_fit_the_sequence() -> None:
    with pytest.raises(AssertionError):
        pack([[piece(A, 0, 4)]], rules(3))


def test_a_picture_is_never_cut() -> None:
    with pytest.raises(AssertionError):
        pack([[Piece(pictures(), 0, 3, 0, 0)]], rules(3, VISION))


def test_checksums_of_parts_add_up_and_see_every_token_and_label() -> None:
    rows = [[piece(A, 0, 4), piece(B, 0, 3)], [piece(B, 3, 8), piece(C, 0, 1)]]
    whole = pack(rows, rules(7))
    assert whole.checksum == sum(pack([row], rules(7)).checksum for row in rows)
    assert whole.checksum == pack(rows[::-1], rules(7)).checksum
    for tensor in (whole.input_ids, whole.labels):
        before = whole.checksum
        tensor[1, 2] += 1
        assert whole.checksum != before
