"""A picture is seen by the later tokens of its document, and by nothing else."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.packing import Batch
from tests.unit.train.model.images import (
    PLACEHOLDER,
    SEEING_FULL,
    VISION,
    Document,
    Frames,
    inputs,
    pack_documents,
)
from tests.unit.train.model.tiny import build
from train.model.multimodal.placeholders import check_images

MODEL = build(SEEING_FULL, noise=0.1)
SIDES = st.sampled_from([8, 16])


@st.composite
def pictures(draw: st.DrawFn) -> Frames:
    shape = (draw(st.integers(1, 2)), draw(SIDES), draw(SIDES), 3)
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    return random.integers(0, 256, shape).astype(np.uint8)


TOKENS = st.integers(0, PLACEHOLDER - 1)
DOCUMENTS = st.lists(st.one_of(TOKENS, TOKENS, pictures()), min_size=1, max_size=6)
SEQUENCES = st.lists(DOCUMENTS, min_size=1, max_size=4)


def run(batch: Batch) -> Tensor:
    """Logits of both heads, [seq, 2, vocab], of a batch of one sequence."""
    check_images(VISION, batch.input_ids, batch.labels, batch.vision)
    with torch.no_grad():
        output = MODEL(*inputs(batch))
    return torch.stack([output.logits, *output.mtp_logits], dim=2)[0]


@settings(max_examples=8, deadline=None)
@given(documents=SEQUENCES)
def test_packed_equals_separate(documents: list[Document]) -> None:
    together = run(pack_documents([documents], VISION))
    alone = torch.cat([run(pack_documents([[document]], VISION)) for document in documents])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(documents=SEQUENCES, picture=pictures(), data=st.data())
def test_changed_pixels_move_only_the_rest_of_their_document(
    documents: list[Document], picture: Frames, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(0, len(documents) - 1))
    documents = [*documents]
    documents[chosen] = [*documents[chosen], picture, 1, 2]
    batch = pack_documents([documents], VISION)
    assert batch.vision is not None
    # The picture's patches come after those of all pictures before it.
    before = pack_documents([[*documents[:chosen], documents[chosen][:-3]]], VISION)
    assert before.vision is not None
    first = len(before.vision.patches)
    patches = batch.vision.patches.clone()
    patches[first : first + picture[..., 0].size // 16] ^= 255
    changed = replace(batch, vision=replace(batch.vision, patches=patches))

    place = before.input_ids.shape[1]
    moved = (run(batch) - run(changed)).abs().amax(-1) > 1e-4
    places = torch.arange(len(moved))
    same = batch.document_ids[0] == chosen
    assert not moved[~(same & (places >= place)), 0].any()
    # MTP at place - 1 is told the picture's first row.
    assert not moved[~(same & (places >= place - 1)), 1].any()
    assert moved[place, 0]
