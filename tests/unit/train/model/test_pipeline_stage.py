"""A model cut into stages: the same parameters, and the same numbers bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.train.model.images import SEEING_FULL, VISION, crop, pack_documents
from tests.unit.train.model.test_transformer import V41
from tests.unit.train.model.tiny import FULL, build, packed, with_changes
from train.model.config import ModelConfig
from train.model.initialize import parameter_init
from train.model.roles import parameter_roles
from train.model.streams import Handover, empty_handover
from train.model.transformer import Transformer
from train.rank_model import RankModel

DSA = with_changes(FULL, attention="dsa")
CUTS = [range(1), range(1, 3), range(3, 4)]


def cut(model: Transformer) -> list[Transformer]:
    """The model's weights in three stages."""
    stages = [Transformer(model.config, layers) for layers in CUTS]
    values = model.state_dict()
    for stage in stages:
        stage.load_state_dict({name: values[name] for name in stage.state_dict()})
    return stages


@pytest.mark.parametrize(
    "config", [FULL, V41, DSA, SEEING_FULL], ids=["v3", "v4.1", "dsa", "images"]
)
def test_stages_share_the_parameters_out(config: ModelConfig) -> None:
    config = replace(config, num_layers=4)
    model = build(config)
    stages = cut(model)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    rank = RankModel(stages)
    assert rank.state_dict().keys() == model.state_dict().keys()
    assert [moe.place for moe in rank.moe_layers()] == list(range(config.num_moe_layers))
    assert len(rank.indexers()) == len(model.indexers()) == config.num_indexers
    inits, roles = parameter_init(model), parameter_roles(model)
    for stage in stages:
        assert all(inits[name].kind == init.kind for name, init in parameter_init(stage).items())
        assert all(roles[name] == role for name, role in parameter_roles(stage).items())
        assert stage.parts().num_experts == config.moe.num_experts
    for part, owner in {"embedding": 0, "vision": 0, "head": 2, "norm": 2, "mtp": 2}.items():
        of_stage = [any(name.startswith(f"{part}.") for name in s.state_dict()) for s in stages]
        there = any(name.startswith(f"{part}.") for name in model.state_dict())
        assert of_stage == [there and stage == owner for stage in range(3)], part


@pytest.mark.parametrize("config", [FULL, V41, DSA], ids=["v3", "v4.1", "dsa"])
def test_stages_one_after_the_other_are_the_model(config: ModelConfig) -> None:
    model = build(replace(config, num_layers=4), noise=0.05)
    inputs = packed((9, 7))
    wanted: Any = model(*inputs)
    crossing: Any = None
    for stage in cut(model):
        crossing = stage(*inputs, None, crossing)
        if isinstance(crossing, Handover):
            tensors = crossing.tensors()
            like = empty_handover(model.config, 2, 16, torch.float32).tensors()
            assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in like]
            crossing = Handover.of(tensors, model.config)
    assert torch.equal(crossing.logits, wanted.logits)
    assert torch.equal(crossing.mtp_logits[0], wanted.mtp_logits[0])


def test_later_stages_turn_by_the_places_of_images() -> None:
    """They have no vision tower, but the rotary positions of images."""
    model = build(replace(SEEING_FULL, num_layers=4), noise=0.05)
    batch = pack_documents([[[9, crop(0, 90, 16, 24), 4, 5]], [[*range(3, 12)]]], VISION)
    inputs = (batch.input_ids, batch.position_ids, batch.document_ids, batch.vision)
    wanted: Any = model(*inputs)
    crossing: Any = None
    for stage in cut(model):
        crossing = stage(*inputs, crossing)
    assert torch.equal(crossing.logits, wanted.logits)
    assert torch.equal(crossing.mtp_logits[0], wanted.mtp_logits[0])


def test_all_stages_follow_the_indexers_training() -> None:
    rank = RankModel(cut(build(replace(DSA, num_layers=4))))
    assert (rank.indexer_stage, rank.is_frozen) == ("sparse", False)
    rank.set_indexer_stage("dense_warmup")
    assert rank.is_frozen
    learning = {name for name, parameter in rank.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in rank.named_parameters() if ".indexer." in name}
    plain = RankModel(cut(build(replace(FULL, num_layers=4))))
    assert plain.indexer_stage is None
    with pytest.raises(ValueError, match="has no indexer"):
        plain.set_indexer_stage("dense")
