"""Vision encoder against transformers' Pixtral, rotary positions against its Qwen-VL models."""

import pytest
import torch
from torch import Tensor, nn

from data.positions import Span, rope_positions
from data.vision import patchify
from tests.unit.train.model.images import Frames, crop
from tests.unit.train.model.tiny import relative_error
from train.model.multimodal.config import VisionConfig, VisionEncoderConfig
from train.model.multimodal.tower import VisionTower
from train.model.rotary import axis_positions, rotary_tables, rotate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

HEADS, HEAD_DIM, PATCH = 2, 16, 8
WIDTH = HEADS * HEAD_DIM


def our_tower() -> VisionTower:
    encoder = VisionEncoderConfig(
        num_layers=2, hidden_size=WIDTH, intermediate_size=48, num_attention_heads=HEADS
    )
    tower = VisionTower(VisionConfig(patch_size=PATCH, encoder=encoder), 24, 1e-5)
    torch.manual_seed(0)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return tower


def pixtral_order() -> Tensor:
    """Our channel at each of a Pixtral head's channels.

    Ours are pairs (2i, 2i + 1), pair i with frequency i, rows at even i and columns at odd i.
    Pixtral has the first member of every pair in the front half of the head, rows before columns.
    """
    pairs = torch.arange(HEAD_DIM // 2)
    front = 2 * torch.cat([pairs[0::2], pairs[1::2]])
    return torch.cat([front, front + 1])


def pixtral(ours: VisionTower) -> nn.Module:
    from transformers import PixtralVisionConfig, PixtralVisionModel  # noqa: PLC0415

    assert ours.encoder is not None
    config = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=64,
        patch_size=PATCH,
        hidden_act="silu",
        attn_implementation="eager",
    )
    config.rope_parameters["rope_theta"] = 10000.0
    model: nn.Module = PixtralVisionModel(config)
    values = {
        "patch_conv.weight": ours.patch_embedding.weight.view(WIDTH, 3, PATCH, PATCH),
        "ln_pre.weight": ours.patch_norm.weight,
    }
    for index, block in ours.encoder.layers.items():
        own = dict(block.named_parameters())
        q, k, v = (x.view(HEADS, HEAD_DIM, WIDTH) for x in own["qkv.weight"].chunk(3))
        q, k = (x[:, pixtral_order()] for x in (q, k))
        layer = f"transformer.layers.{index}"
        for name, value in zip("qkv", (q, k, v), strict=True):
            values[f"{layer}.attention.{name}_proj.weight"] = value.flatten(0, 1)
        values[f"{layer}.attention.o_proj.weight"] = own["o.weight"]
        for name in ("gate", "up", "down"):
            values[f"{layer}.feed_forward.{name}_proj.weight"] = own[f"ffn.{name}.weight"]
        for name in ("attention_norm", "ffn_norm"):
            values[f"{layer}.{name}.weight"] = own[f"{name}.weight"]
    model.load_state_dict({name: value.detach() for name, value in values.items()})
    return model


def test_tower_up_to_the_merge_equals_pixtral() -> None:
    """Two crops of a photograph, of different sizes: outputs and gradients of all weights."""
    ours = our_tower()
    theirs = pixtral(ours)
    crops = [crop(100, 120, 48, 64), crop(180, 200, 32, 16)]
    mine, wanted = merged_by_us(ours, crops), merged_by_pixtral(ours, theirs, crops)
    assert mine.shape == (12 + 2, WIDTH * 4)
    assert relative_error(mine, wanted) < 2e-5

    weight = torch.randn_like(wanted)
    reference = torch.autograd.grad((wanted * weight).sum(), list(theirs.parameters()))
    named = dict(zip(dict(theirs.named_parameters()), reference, strict=True))
    (mine * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.encoder is not None
    first = ours.encoder.layers["0"]
    checks = {
        "patch_conv.weight": ours.patch_embedding.weight.grad,
        "ln_pre.weight": ours.patch_norm.weight.grad,
        "transformer.layers.0.attention_norm.weight": first.attention_norm.weight.grad,  # type: ignore[union-attr]
        "transformer.layers.0.attention.o_proj.weight": first.o.weight.grad,  # type: ignore[union-attr]
        "transformer.layers.0.feed_forward.up_proj.weight": first.ffn.up.weight.grad,  # type: ignore[union-attr]
    }
    for name, found in checks.items():
        assert isinstance(found, Tensor)
        assert relative_error(found, named[name].view_as(found)) < 2e-5, name
    q = first.qkv.weight.grad[:WIDTH].unflatten(0, (HEADS, -1))[:, pixtral_order()]  # type: ignore[union-attr, index]
    wanted_q = named["transformer.layers.0.attention.q_proj.weight"].view_as(q)
    assert relative_error(q, wanted_q) < 2e-5


def merged_by_us(ours: VisionTower, crops: list[Frames]) -> Tensor:
    """What our projector is given: blocks of 2 x 2 patches."""
    given: list[Tensor] = []
    handle = ours.projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    cut = [patchify(x, patch_size=PATCH, frames_per_patch=1, spatial_merge=2) for x in crops]
    patches = torch.cat([torch.from_numpy(patches) for patches, _ in cut])
    ours(patches, torch.tensor([grid for _, grid in cut]))
    handle.remove()
    return given[0]


def merged_by_pixtral(ours: VisionTower, theirs: nn.Module, crops: list[Frames]) -> Tensor:
    """Pixtral's patches, after our final norm, cut into the same blocks."""
    canvas = torch.zeros(2, 3, 48, 64)
    for image, frames in zip(canvas, crops, strict=True):
        pixels = torch.from_numpy(frames[0].copy()).permute(2, 0, 1) / 127.5 - 1
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    sizes = [(frames.shape[1], frames.shape[2]) for frames in crops]
    patches = theirs(canvas, image_sizes=sizes).last_hidden_state[0]
    assert ours.encoder is not None
    normalised = ours.encoder.norm(patches).split([48, 8])
    return torch.cat(
        [
            x.view(height // 16, 2, width // 16, 2, WIDTH).transpose(1, 2).flatten(0, 1).flatten(1)
            for x, (height, width) in zip(normalised, sizes, strict=True)
        ]
    )


@pytest.mark.parametrize("sections", [(4, 2, 2), (3, 3, 2), (24, 20, 20)])
def test_rotation_equals_qwen3_vl(sections: tuple[int, int, int]) -> None:
    from transformers import Qwen3VLTextConfig  # noqa: PLC0415
    from transformers.models.qwen3_vl.modeling_qwen3_vl import (  # noqa: PLC0415
        Qwen3VLTextRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    width = 2 * sum(sections)
    config = Qwen3VLTextConfig(hidden_size=32, num_attention_heads=2, head_dim=width)
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": list(sections),
    }
    positions = torch.randint(0, 300, (2, 11, 3), generator=torch.Generator().manual_seed(0))
    q, k = torch.randn(2, 2, 11, 2, width).unbind(0)
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(q, positions.permute(2, 0, 1))
    # Theirs pairs channel i with i + width / 2, ours 2i with 2i + 1.
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    wanted = apply_rotary_pos_emb(q[..., order], k[..., order], cos, sin, unsqueeze_dim=2)
    tables = rotary_tables(axis_positions(positions, sections), width, 10000.0)
    for x, reference in zip((q, k), wanted, strict=True):
        assert relative_error(rotate(x, *tables)[..., order], reference) < 2e-6


def test_positions_equal_qwen2_vl() -> None:
    """Text, a picture of 2 x 3 rows, text, a clip of 2 x 1 x 2 rows, text."""
    from transformers import Qwen2VLConfig, Qwen2VLModel  # noqa: PLC0415

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "vocab_size": 64,
        },
        vision_config={"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1},
    )
    model = Qwen2VLModel(config)
    types = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2 + [2] * 4 + [0] * 3])
    wanted, _ = model.get_rope_index(
        torch.zeros_like(types),
        types,
        image_grid_thw=torch.tensor([[1, 4, 6]]),
        video_grid_thw=torch.tensor([[2, 2, 4]]),
    )
    found = rope_positions(18, [Span(3, (1, 2, 3)), Span(11, (2, 1, 2))])
    assert found.T.tolist() == wanted[:, 0].tolist()
