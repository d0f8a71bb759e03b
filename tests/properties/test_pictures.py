"""Sizes, frames and placeholders of any picture: pure functions that keep their promises."""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.config import ImageConfig
from data.content import Piece
from data.faults import Fault
from data.images import fit
from data.index import Medium
from data.packing import PackingRules, pack
from data.pictures import PictureDocuments, VisionGeometry
from data.video import frame_numbers
from tests.unit.data.pixels import jpeg, noise

MARKER = 2


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    unit=st.integers(1, 64),
    most=st.integers(1, 400),
)
def test_sizes_keep_bound_and_aspect(width: int, height: int, unit: int, most: int) -> None:
    columns, rows = fit(width, height, unit=unit, max_units=most)
    assert min(columns, rows) >= 1
    assert columns * rows <= most
    # Never more than one unit larger than the picture.
    assert columns * unit < width + unit
    assert rows * unit < height + unit
    # The largest picture of the same aspect within the bound, by its definition.
    scale = min(1.0, math.sqrt(most * unit * unit / (width * height)))
    x, y = width / unit * scale, height / unit * scale
    if x >= 1 and y >= 1:
        assert abs(columns - x) < 1
        assert abs(rows - y) < 1
    assert fit(height, width, unit=unit, max_units=most) == (rows, columns) or _ties(x, y)


def _ties(x: float, y: float) -> bool:
    """Sides between which two choices are equally far, so that the first one listed is taken."""
    costs = sorted(
        max(a / x, x / a) * max(b / y, y / b)
        for a in {max(1, math.floor(x)), math.ceil(x)}
        for b in {max(1, math.floor(y)), math.ceil(y)}
    )
    return any(math.isclose(p, q, rel_tol=1e-9) for p, q in pairwise(costs))


@given(
    side=st.integers(1, 10), other=st.integers(1, 10), unit=st.integers(1, 64), rest=st.integers(0)
)
def test_multiples_that_fit_stay_as_they_are(side: int, other: int, unit: int, rest: int) -> None:
    most = side * other + rest % 50
    assert fit(side * unit, other * unit, unit=unit, max_units=most) == (side, other)


@given(
    frames=st.integers(1, 100_000),
    fps=st.floats(0.5, 240, width=32),
    rate=st.floats(0.1, 60),
    most=st.integers(1, 64),
    per_patch=st.integers(1, 4),
)
def test_frames_are_within_the_clip_and_evenly_spread(
    frames: int, fps: float, rate: float, most: int, per_patch: int
) -> None:
    most = max(most, per_patch)
    numbers = frame_numbers(
        frames, fps, frames_per_second=rate, max_frames=most, frames_per_patch=per_patch
    )
    assert numbers == sorted(numbers)
    assert len(numbers) % per_patch == 0
    assert per_patch <= len(numbers) <= most
    assert numbers[0] == 0
    assert numbers[-1] <= frames - 1
    if len(set(numbers)) == len(numbers) > 1:
        gaps = np.diff(numbers)
        assert gaps.max() - gaps.min() <= 1
        spread = max(fps / rate, 1.0)
        thinned = (frames - 1) // spread + 1 > most
        assert gaps.mean() >= spread - 1 or thinned
        if not thinned:  # the times are those that were asked for, to half a frame
            times = np.arange(len(numbers)) * spread
            assert np.abs(np.array(numbers) - times).max() <= 0.5 + 1e-6 * frames


class Stored:
    """Documents in memory, as `data.reader.SplitReader` gives them."""

    def __init__(self, documents: list[tuple[NDArray[np.unsignedinteger], list[Medium]]]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def num_tokens(self, document: int) -> int:
        return len(self._documents[document][0])

    def stored_tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        return self._documents[document][0]

    def media(self, document: int) -> list[Medium]:
        return self._documents[document][1]

    def payload(self, document: int, member: int) -> bytes:
        medium = next(m for m in self.media(document) if m.member == member)
        return jpeg(noise(medium.width, medium.height, seed=member))

    def fault(self, document: int, cause: str, detail: str) -> Fault:
        raise AssertionError(detail)


@st.composite
def stored(draw: st.DrawFn) -> tuple[NDArray[np.unsignedinteger], list[Medium]]:
    """A document of text and images in any order."""
    tokens: list[int] = []
    media: list[Medium] = []
    for size in draw(
        st.lists(st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200)), max_size=8)
    ):
        if size is None:
            tokens += draw(st.lists(st.integers(3, 500), min_size=1, max_size=9))
        else:
            width, height = size
            media.append(
                Medium(
                    member=len(media), place=len(tokens), kind="image", width=width, height=height
                )
            )
            tokens.append(MARKER)
    return np.array([*tokens, 0], np.uint16), media


geometries = st.builds(
    VisionGeometry,
    placeholder_token_id=st.just(MARKER),
    patch_size=st.sampled_from([4, 7]),
    frames_per_patch=st.integers(1, 2),
    spatial_merge=st.integers(1, 3),
)


@settings(deadline=None, max_examples=40)
@given(document=stored(), vision=geometries, most=st.integers(1, 12))
def test_placeholders_are_the_rows_of_the_patches(
    document: tuple[NDArray[np.unsignedinteger], list[Medium]], vision: VisionGeometry, most: int
) -> None:
    tokens, media = document
    documents = PictureDocuments(Stored([document]), vision, ImageConfig(max_rows=most))
    content, spans = documents.read(0), documents.spans(0)
    assert documents.num_tokens(0) == len(content.tokens)
    assert spans == [(p.start, p.stop) for p in content.pictures]
    inside = np.zeros(len(content.tokens), bool)
    for picture in content.pictures:
        t, h, w = picture.grid
        assert picture.rows == (t, h // vision.spatial_merge, w // vision.spatial_merge)
        assert len(picture.patches) == prod(picture.grid)
        assert prod(picture.rows) * vision.spatial_merge**2 == len(picture.patches)
        assert prod(picture.rows) <= most
        assert not inside[picture.start : picture.stop].any()
        inside[picture.start : picture.stop] = True
    np.testing.assert_array_equal(content.tokens == MARKER, inside)
    np.testing.assert_array_equal(content.tokens[~inside], tokens[tokens != MARKER])
    assert len(content.pictures) == len(media)


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(stored(), min_size=1, max_size=5), vision=geometries, extra=st.integers(0, 9)
)
def test_packed_batches_have_a_row_for_every_placeholder_and_no_label_of_one(
    documents: Sequence[tuple[NDArray[np.unsignedinteger], list[Medium]]],
    vision: VisionGeometry,
    extra: int,
) -> None:
    source = PictureDocuments(Stored(list(documents)), vision, ImageConfig(max_rows=6))
    contents = [source.read(number) for number in range(len(source))]
    pieces = [Piece(c, 0, len(c.tokens), 0, n) for n, c in enumerate(contents)]
    length = sum(len(c.tokens) for c in contents) + extra
    rules = PackingRules(sequence_length=length, padding_id=1, num_sources=1, vision=vision)
    batch = pack([pieces, pieces[:1]], rules)
    assert batch.vision is not None
    rows = batch.vision.patches_per_sequence() // vision.spatial_merge**2
    assert rows.tolist() == (batch.input_ids == MARKER).sum(1).tolist()
    assert (batch.labels != MARKER).all()
    assert batch.source_tokens == (length - extra + len(contents[0].tokens),)
    # Positions start at 0 in every document, and those of padding too.
    first = batch.position_ids == 0
    assert (batch.vision.rope_positions[first] == 0).all()
    for row in range(2):
        ids = batch.document_ids[row]
        assert first[row].nonzero().flatten().tolist() == [0, *(ids.diff().nonzero() + 1).flatten()]
