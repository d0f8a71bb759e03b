"""Documents with pictures on real shards: contents, damage, and what is refused before training."""

from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig, FaultConfig
from data.faults import DamagedSampleError
from data.loader import build_loader
from data.pictures import PictureDocuments, VisionGeometry, picture_problems
from data.reader import SplitReader
from data.vision import patchify
from tests.unit.data.albums import (
    IMAGE,
    MARKER,
    VISION,
    clip,
    document,
    image,
    some_documents,
    write_album,
)
from tests.unit.data.clips import decode_one_by_one
from tests.unit.data.pixels import assert_rounds_alike


def open_album(config: DataConfig) -> PictureDocuments:
    reader = SplitReader(config.sources["album"].path, source="album", split="train")
    return PictureDocuments(reader, VISION, IMAGE)


def test_a_document_from_its_bytes_to_patches_by_hand(tmp_path: Path) -> None:
    """Images and a clip of 9 frames at 10 a second, of which every second one is taken."""
    still, film = image(4), clip(6)  # 36 x 28 pixels: 4.5 x 3.5 units of 8, of which 6 fit
    assert (still.width, still.height, film.frames) == (36, 28, 9)
    config = write_album(tmp_path, [document("album/000", [50, still, 51, film, 52])])
    documents = open_album(config)
    # 5 frames, of which 4 make two groups, each of 4 x 3 units, of which 6 fit.
    expected = [50, *[MARKER] * 6, 51, *[MARKER] * 12, 52, 0]
    content = documents.read(0)
    assert content.tokens.tolist() == expected
    assert documents.num_tokens(0) == len(expected)
    assert documents.spans(0) == [(1, 7), (8, 20)]
    first, second = content.pictures
    assert (first.start, first.rows, first.grid) == (1, (1, 2, 3), (1, 4, 6))
    assert (second.start, second.rows, second.grid) == (8, (2, 2, 3), (2, 4, 6))

    size, cut = (24, 16), {"patch_size": 4, "frames_per_patch": 2, "spatial_merge": 2}
    pixels = Image.open(BytesIO(still.payload)).resize(size, Image.Resampling.BICUBIC)
    wanted, _ = patchify(np.stack([np.asarray(pixels)] * 2), **cut)
    assert_rounds_alike(first.patches, wanted)
    frames = [decode_one_by_one(film.payload)[number] for number in (0, 2, 4, 6)]
    resized = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]
    wanted, _ = patchify(np.stack([np.asarray(frame) for frame in resized]), **cut)
    assert_rounds_alike(second.patches, wanted)


def broken() -> list[Any]:
    """Twelve documents, of which the sixth has an image that is cut short (its checksum is right)."""
    documents = some_documents(12)
    whole = image(5)
    short = replace(whole, payload=whole.payload[:-60])
    return [*documents[:5], document("album/005", [9, short]), *documents[6:]]


def load(config: DataConfig, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "split": "train",
        "seed": 0,
        "global_batch_size": 4,
        "data_rank": 0,
        "data_size": 1,
        "vision": VISION,
    }
    return build_loader(config, **(arguments | changes))


def test_an_image_that_cannot_be_decoded_raises_with_its_place(tmp_path: Path) -> None:
    config = write_album(tmp_path, broken())
    with pytest.raises(DamagedSampleError) as caught:
        list(islice(load(config), 30))
    message = str(caught.value)
    assert "source album, shard " in message
    assert "key album/005: undecodable, image at token 1: " in message
    assert "data.faults.damaged=skip" in message


def test_an_image_that_cannot_be_decoded_is_left_out_and_told(tmp_path: Path) -> None:
    faults = FaultConfig(damaged="skip", max_skipped_fraction=0.5)
    batches = [b for b, _ in islice(load(write_album(tmp_path, broken(), faults=faults)), 30)]
    found = [fault for batch in batches for fault in batch.faults]
    assert found
    assert {(fault.source, fault.key, fault.cause) for fault in found} == {
        ("album", "album/005", "undecodable")
    }
    for batch in batches:
        rows = batch.vision.patches_per_sequence() // VISION.spatial_merge**2
        assert torch.equal(rows, (batch.input_ids == MARKER).sum(1))


def test_text_alone_has_no_vision_and_pictures_need_it(tmp_path: Path) -> None:
    config = write_album(tmp_path, some_documents(6))
    text = replace(config, sources={"text": config.sources["text"]})
    assert next(load(text))[0].vision is None
    assert next(load(text, vision=None))[0].vision is None
    assert next(load(config))[0].vision is not None
    with pytest.raises(
        ValueError,
        match=r"model\.vision=null: data\.sources\.album holds 8 images and 2 clips; use "
        r"model=v4_nano_mm or model\.vision\.placeholder_token_id=2, or leave the source out",
    ):
        load(config, vision=None)


@pytest.mark.parametrize(
    ("vision", "image", "length", "problem"),
    [
        ({"placeholder_token_id": 7}, {}, 32, r"id=7: .*album marks .* token 2; use .*_id=2"),
        ({"channels": 1}, {}, 32, r"channels=1: pictures are decoded to RGB; use 3"),
        ({}, {"max_rows": 33, "max_frames": 2}, 32, r"max_rows=33: an image .*=32; use 32 or less"),
        ({}, {}, 23, r"= 24 tokens, .*=23; use data\.image\.max_frames=6 or .*max_rows=5 or less"),
        ({"frames_per_patch": 9}, {}, 32, r"max_frames=8: must hold .*frames_per_patch=9; use 9"),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers(
    tmp_path: Path, vision: dict[str, Any], image: dict[str, Any], length: int, problem: str
) -> None:
    config = write_album(tmp_path, some_documents(4), sequence_length=length)
    config = replace(config, image=replace(IMAGE, **image))
    seen: VisionGeometry = replace(VISION, **vision)
    with pytest.raises(ValueError, match=problem):
        load(config, vision=seen)


@pytest.mark.parametrize("length", range(6, 40))
def test_the_remedy_of_a_clip_that_does_not_fit_is_one(tmp_path: Path, length: int) -> None:
    """Whichever of the two values is taken."""
    config = write_album(tmp_path, [document("album/0", [clip(1)])], sequence_length=length)
    problems = list(picture_problems(config, VISION, length))
    assert bool(problems) == (length < 24)
    for line in problems:
        for word in line.partition("; use ")[2].replace(" or less", "").split(" or "):
            name, _, value = word.removeprefix("data.image.").partition("=")
            fixed = replace(config, image=replace(IMAGE, **{name: int(value)}))
            assert not list(picture_problems(fixed, VISION, length)), word


def test_a_run_goes_on_only_with_the_same_sizes(tmp_path: Path) -> None:
    config = write_album(tmp_path, some_documents(6))
    _, state = next(load(config))
    other = replace(config, image=replace(IMAGE, max_rows=5))
    with pytest.raises(ValueError, match=r"data\.image\.max_rows=5: the saved data position has 6"):
        next(load(other, state=state))
