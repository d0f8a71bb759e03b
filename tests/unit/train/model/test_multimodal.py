"""Patches to rows to placeholders, on real pixels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.packing import Batch
from data.vision import VisionInput, patchify
from tests.tokens import tokens_of
from tests.unit.train.model.images import (
    ENCODER,
    PLACEHOLDER,
    SEEING,
    SEEING_FULL,
    VISION,
    Document,
    Frames,
    crop,
    inputs,
    pack_documents,
    photograph,
)
from tests.unit.train.model.tiny import FULL, build, packed, relative_error, with_changes
from train.model.attention.config import CompressedConfig
from train.model.initialize import parameter_init
from train.model.multimodal.config import VisionConfig
from train.model.multimodal.encoder import attend_within_frames
from train.model.multimodal.placeholders import check_images
from train.model.multimodal.tower import VisionTower
from train.model.transformer import Transformer

HYBRID = CompressedConfig(rope_head_dim=FULL.mla.qk_rope_head_dim)


def tower(config: VisionConfig, hidden: int = 12) -> VisionTower:
    torch.manual_seed(0)
    built = VisionTower(config, hidden, 1e-6)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def rows_of(model: VisionTower, frames: Frames, config: VisionConfig) -> Tensor:
    patches, grid = patchify(
        frames,
        patch_size=config.patch_size,
        frames_per_patch=config.frames_per_patch,
        spatial_merge=config.spatial_merge,
    )
    found: Tensor = model(torch.from_numpy(patches), torch.tensor([grid]))
    return found.detach()


def plain_pixels(frames: Frames) -> Tensor:
    """[1, channels, frames, height, width] from -1 to 1."""
    pixels = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float()
    return (pixels - 127.5) / 127.5


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_embedding_and_merge_are_a_convolution_and_an_unfold(merge: int) -> None:
    """On the photograph: conv2d with stride = kernel, then F.unfold for the blocks of patches."""
    config = replace(VISION, encoder=None, spatial_merge=merge)
    model = tower(config)
    frames = photograph()[:, :, :504]
    kernels = model.patch_embedding.weight.view(-1, 3, 4, 4)
    embedded = F.conv2d(plain_pixels(frames)[:, :, 0], kernels, stride=4)
    normalised = F.rms_norm(
        embedded.permute(0, 2, 3, 1), (12,), model.patch_norm.weight, 1e-6
    ).permute(0, 3, 1, 2)
    # unfold's columns are ordered (channel, row, column); the merge is (row, column, channel).
    blocks = F.unfold(normalised, merge, stride=merge)[0].T.reshape(-1, 12, merge**2).mT.flatten(1)
    assert isinstance(model.projector, nn.Sequential)
    first, _, second = model.projector
    wanted = second(F.gelu(first(blocks)))
    found = rows_of(model, frames, config)
    assert found.shape == (150 // merge * (126 // merge), 12)
    assert relative_error(found, wanted) < 2e-5


def test_a_clip_is_a_convolution_in_three_dimensions() -> None:
    config = replace(
        VISION, encoder=None, spatial_merge=1, frames_per_patch=2, projector_intermediate_size=None
    )
    model = tower(config)
    # The photograph passing by: each frame is shifted by five pixels.
    frames = np.concatenate([crop(80, 5 * step, 32, 48) for step in range(6)])
    kernels = model.patch_embedding.weight.view(-1, 3, 2, 4, 4)
    embedded = F.conv3d(plain_pixels(frames), kernels, stride=(2, 4, 4))[0].flatten(1).T
    wanted = model.projector(F.rms_norm(embedded, (12,), model.patch_norm.weight, 1e-6))
    assert relative_error(rows_of(model, frames, config), wanted) < 2e-5


def test_patches_see_their_own_frame_only() -> None:
    """A clip through the encoder equals its frames one by one, whatever stands beside it."""
    model = tower(VISION)
    clip = np.concatenate([crop(0, 0, 16, 24), crop(200, 100, 16, 24), crop(300, 90, 16, 24)])
    other = crop(150, 150, 40, 8)
    alone = torch.cat([rows_of(model, clip[i : i + 1], VISION) for i in range(3)])
    patches = [
        patchify(x, patch_size=4, frames_per_patch=1, spatial_merge=2) for x in (other, clip, other)
    ]
    together = model(
        torch.from_numpy(np.concatenate([p for p, _ in patches])),
        torch.tensor([grid for _, grid in patches]),
    )
    assert relative_error(together[5 : 5 + len(alone)], alone) < 1e-6
    # Within a frame every row sees every patch.
    changed = clip.copy()
    changed[1, -1, -1] ^= 255
    moved = (rows_of(model, changed, VISION) - alone).abs().amax(1) > 1e-6
    assert moved.view(3, 6).all(1).tolist() == [False, True, False]
    assert moved.view(3, 6).any(1).tolist() == [False, True, False]


def test_attention_within_frames_is_the_masked_softmax() -> None:
    lengths = [3, 3, 5, 1, 3]
    frame = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    q, k, v = (x.double().requires_grad_() for x in torch.randn(3, 1, 15, 2, 4).unbind(0))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = scores.masked_fill(frame[:, None] != frame, float("-inf"))
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    found = attend_within_frames(q, k, v, lengths)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), (q, k, v))
    reference = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations that are computed, and the size of their largest result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function))
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_within_a_frame_keeps_no_square_of_patches(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2048, 1, 8, dtype=dtype).unbind(0)
    with Operations() as operations:
        attend_within_frames(q.requires_grad_(), k, v, [2048]).sum().backward()  # type: ignore[no-untyped-call]
    assert operations.largest <= 2 * q.numel()


def picture_batch() -> Batch:
    """Two sequences of two documents; the second sequence has no picture."""
    text = list(range(1, 9))
    first: list[Document] = [
        [5, 6, crop(100, 100, 16, 24), 7],
        [crop(0, 0, 8, 8), 1, crop(60, 60, 16, 8), 2, 3],
    ]
    return pack_documents([first, [text, text[1:]]], VISION)


def test_rows_stand_at_their_placeholders() -> None:
    model = build(SEEING, noise=0.1)
    batch = picture_batch()
    assert batch.vision is not None
    assert model.vision is not None
    placed = model._rows(batch.input_ids, batch.vision)
    assert placed is not None
    tokens = tokens_of(batch.position_ids, batch.document_ids, batch.input_ids)
    embedding = model._embed(tokens, placed)
    at = batch.input_ids == PLACEHOLDER
    rows = model.vision(batch.vision.patches, batch.vision.grids)
    assert len(rows) == 6 + 1 + 2
    assert torch.equal(embedding[at], rows)
    assert torch.equal(embedding[~at], model.embedding(batch.input_ids)[~at])
    # MTP is told at t what stands at t + 1: the third token of document 0 is its first row.
    following = model._embed(tokens, placed.next(batch.document_ids))
    assert torch.equal(following[0, 1], rows[0])
    # The last token of the first document is text, and sees no row of the next document.
    last = int((batch.document_ids[0] == 0).sum()) - 1
    assert placed.next(batch.document_ids).numbers[0, last] == 0


def test_the_memory_looks_back_over_text_only() -> None:
    """After a picture the n-grams begin anew, as at the start of a document."""
    memory = build(SEEING_FULL).engram_layers()[1]
    picture = crop(0, 0, 8, 8)
    seen = pack_documents([[[5, 6, picture, 7, 8, 9]]], VISION)
    fresh = pack_documents([[[7, 8, 9]]], VISION)
    rows = memory.hash(seen.input_ids, seen.document_ids)
    assert torch.equal(rows[:, 3:], memory.hash(fresh.input_ids, fresh.document_ids))
    # A model without vision takes the same id for a word.
    text = build(FULL).engram_layers()[1].hash(seen.input_ids, seen.document_ids)
    assert not torch.equal(rows[:, 3], text[:, 3])


@pytest.mark.parametrize("attention", ["mla", "dsa", "v4_hybrid"])
def test_attention_turns_by_the_positions_on_all_axes(attention: str) -> None:
    """Exchanging t and w moves what sees the picture, and nothing else."""
    model = build(with_changes(SEEING, attention=attention, compressed=HYBRID), noise=0.1)
    batch = picture_batch()
    assert batch.vision is not None
    turned = replace(batch.vision, rope_positions=batch.vision.rope_positions.flip(-1))
    logits = [model(*inputs(replace(batch, vision=v))).logits for v in (batch.vision, turned)]
    moved = (logits[0] - logits[1]).abs().amax(-1) > 1e-6
    # From the last rows of the picture, where w is not t, to the end of its document.
    assert moved[0, 5:9].all()
    assert not moved[0, :2].any()
    assert not moved[1].any()


@pytest.mark.parametrize("encoder", [ENCODER, None])
@pytest.mark.parametrize("intermediate", [24, None])
def test_every_parameter_is_initialised_and_learns(encoder: Any, intermediate: int | None) -> None:
    vision = replace(VISION, encoder=encoder, projector_intermediate_size=intermediate)
    model = build(replace(SEEING_FULL, vision=vision), noise=0.05)
    assert parameter_init(model).keys() == {name for name, _ in model.named_parameters()}
    output = model(*inputs(picture_batch()))
    (output.logits.square().mean() + output.mtp_logits[0].square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_pictures_every_weight_of_the_tower_has_a_zero_gradient(dtype: torch.dtype) -> None:
    model = build(SEEING).to(dtype)
    model(*packed((9, 7), vocab=PLACEHOLDER)).logits.square().mean().backward()
    assert model.vision is not None
    for name, parameter in model.vision.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(
    "attention", ["mla", pytest.param("dsa", marks=pytest.mark.slow), "v4_hybrid"]
)
def test_text_is_computed_as_without_vision_bit_by_bit(attention: str) -> None:
    seeing, plain = (
        build(with_changes(config, attention=attention, compressed=HYBRID), seed=3)
        for config in (SEEING_FULL, FULL)
    )
    shared = {n: p for n, p in seeing.named_parameters() if not n.startswith("vision.")}
    assert shared.keys() == {n for n, _ in plain.named_parameters()}
    batch = packed((9, 7), vocab=PLACEHOLDER)
    same_on_all_axes = VisionInput(
        patches=torch.empty(0, 48, dtype=torch.uint8),
        grids=torch.empty(0, 3, dtype=torch.int64),
        images_per_sequence=torch.zeros(2, dtype=torch.int64),
        rope_positions=batch[1].unsqueeze(-1).repeat(1, 1, 3),
    )
    wanted = plain(*batch)
    for images in (None, same_on_all_axes):
        found = seeing(*batch, images)
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.mtp_logits[0], wanted.mtp_logits[0])
    seeing(*batch).logits.square().mean().backward()
    wanted.logits.square().mean().backward()
    for name, parameter in plain.named_parameters():
        mine = shared[name].grad
        assert (parameter.grad is None) == (mine is None), name
        assert parameter.grad is None or mine is None or torch.equal(parameter.grad, mine), name


def test_a_text_model_pays_nothing() -> None:
    """No module, no parameter, no buffer, and no operation but the lookup of the tokens."""
    model = build(FULL)
    assert not any("vision" in name for name, _ in model.named_modules())
    ids, positions, documents = packed((9, 7))
    tokens = tokens_of(positions, documents, ids)
    with Operations() as operations:
        assert model._rows(ids, None) is None
        assert model._pair_positions(None, ids.device) is None
        model._embed(tokens, None)
    assert operations.names == ["aten.embedding.default"]


def test_parts_are_the_encoder_blocks_then_the_tower() -> None:
    model = build(SEEING)
    assert model.vision is not None
    assert model.vision.encoder is not None
    blocks = list(model.parts().blocks)
    assert blocks[:3] == [*model.vision.encoder.layers.values(), model.vision]
    assert blocks[3:] == list(model.layers.values())


def test_bf16_stays_close_to_fp32() -> None:
    model = build(SEEING, noise=0.02)
    assert model.vision is not None
    vision = picture_batch().vision
    assert vision is not None
    wanted = model.vision(vision.patches, vision.grids)
    found = model.vision.bfloat16()(vision.patches, vision.grids)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted) < 0.03


def checked(batch: Batch, config: VisionConfig | None = VISION, **changes: Any) -> None:
    changed = replace(batch, **changes)
    check_images(config, changed.input_ids, changed.labels, changed.vision)


def test_what_does_not_fit_is_refused_by_name() -> None:
    batch = picture_batch()
    checked(batch)
    checked(pack_documents([[[1, 2, 3]]], VISION), None, vision=None)
    with pytest.raises(ValueError, match=r"model\.vision=null: the batch holds 3 images"):
        checked(batch, None)
    with pytest.raises(ValueError, match=r"hold \[9, 0\] placeholders.* make \[0, 0\] rows"):
        checked(batch, vision=None)
    ids = batch.input_ids.clone()
    ids[1, 0] = PLACEHOLDER  # the other sequence would get a row of the first one's pictures
    with pytest.raises(ValueError, match=r"hold \[9, 1\] placeholders.* make \[9, 0\] rows"):
        checked(batch, input_ids=ids)
    with pytest.raises(ValueError, match=r"4 labels are placeholders.*-100"):
        checked(batch, labels=batch.labels.index_fill(1, torch.tensor([0, 4]), PLACEHOLDER))
    with pytest.raises(ValueError, match="= 192 values, and those of the batch have 48"):
        checked(batch, replace(VISION, patch_size=8))
    with pytest.raises(ValueError, match=r"spatial_merge=4: must divide .*\[1, 4, 6\]"):
        checked(batch, replace(VISION, spatial_merge=4))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rope_sections": (1, 1)}, r"rope_sections=\[1,1\]: .*for example \[2,0,0\]"),
        ({"rope_sections": (1, 1, 1)}, r"add up to half of model.mla.qk_rope_head_dim=4"),
        ({"rope_sections": (3, 0, -1)}, r"rope_sections=\[3,0,-1\]"),
        ({"placeholder_token_id": 64}, "placeholder_token_id=64: .*use 0 to 63"),
        ({"encoder": replace(ENCODER, hidden_size=20)}, "hidden_size=20: .*of 8; use 24"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused_by_name(changes: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Transformer(with_changes(SEEING, vision=replace(VISION, **changes)))


SHAPES = ("circle", "square", "cross", "bars")


def drawing(shape: str, random: np.random.Generator) -> Frames:
    """16 x 16 pixels with a shape of any place, size and colour on a ground of any colour."""
    dark, light = random.integers(0, 90, 3).tolist(), random.integers(165, 256, 3).tolist()
    ground, ink = (dark, light) if random.integers(2) else (light, dark)
    image = Image.new("RGB", (16, 16), tuple(ground))
    draw = ImageDraw.Draw(image)
    colour = tuple(ink)
    size = int(random.integers(9, 13))
    x, y = (int(n) for n in random.integers(0, 16 - size, 2))
    box = (x, y, x + size, y + size)
    if shape == "circle":
        draw.ellipse(box, outline=colour, width=2)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "cross":
        draw.line(box, fill=colour, width=2)
        draw.line((x, y + size, x + size, y), fill=colour, width=2)
    else:
        for row in range(y, y + size + 1, 4):
            draw.line((x, row, x + size, row), fill=colour, width=2)
    return np.asarray(image, np.uint8)[None]


def quiz(random: np.random.Generator, questions: int) -> Batch:
    """Sequences of four documents: a drawing, then the token that names its shape."""
    answers = random.integers(0, len(SHAPES), (questions // 4, 4))
    batch = pack_documents(
        [[[1, drawing(SHAPES[a], random), 2, 10 + int(a)] for a in row] for row in answers], VISION
    )
    named = (batch.labels >= 10) & (batch.labels < PLACEHOLDER)
    return replace(batch, labels=torch.where(named, batch.labels, -100))


def quiz_loss(model: Transformer, batch: Batch) -> Tensor:
    return F.cross_entropy(model(*inputs(batch)).logits.flatten(0, 1), batch.labels.flatten())


@pytest.mark.slow
def test_it_learns_to_tell_drawings_apart() -> None:
    """Without looking, ln 4 = 1.39 nats is the best; on new drawings it does far better."""
    model = build(SEEING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    random = np.random.default_rng(0)
    for _ in range(60):
        quiz_loss(model, quiz(random, 64)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    fresh = quiz(np.random.default_rng(1), 256)
    with torch.no_grad():
        seen = float(quiz_loss(model, fresh))
        assert fresh.vision is not None
        blank = replace(fresh.vision, patches=torch.zeros_like(fresh.vision.patches))
        unseen = float(quiz_loss(model, replace(fresh, vision=blank)))
    assert seen < 0.7
    assert unseen > 1.3
