"""Finding the documents of a step from the files of a run."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
from torch.distributed.checkpoint.state_dict_saver import save

from data.loader import build_loader
from tests.unit.data.corpora import unique_tokens, write_corpus
from train.checkpoint.commit import checkpoint_path
from train.config import RunConfig, StageConfig, TrainConfig
from train.locate import locate
from train.recipe import save_resolved


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_step_is_found_from_the_newest_checkpoint_before_it(tmp_path: Path) -> None:
    texts = unique_tokens({"code": [30, 5, 60, 8, 17], "docs": [12, 44, 3]})
    data = write_corpus(tmp_path, texts, sequence_length=16, num_lanes=4)
    stages = (StageConfig(steps=5), StageConfig(sequence_length=32))
    train = TrainConfig(steps=20, global_batch_size=4, micro_batch_size=4, stages=stages)
    config = RunConfig(name="run", data=data, train=train)
    save_resolved(config, tmp_path / "recipe.yaml")
    loader = build_loader(
        data, split="train", seed=train.seed, global_batch_size=4, data_rank=0, data_size=1
    )
    batches = list(islice(loader, 5))
    for step in (2, 4):
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        state = {f"data.{key}": text for key, text in batches[step - 1][1].items()}
        save(state, checkpoint_id=path, no_dist=True)
        (path / "checkpoint.json").write_text(json.dumps({"only_weights": False}))
    for step in (1, 3, 5):
        tokens: list[int] = []
        for place in locate(tmp_path, step):
            name, _, number = place.key.partition("/")
            tokens += texts[name][int(number)][place.start : place.stop].tolist()
        assert tokens == batches[step - 1][0].input_ids.flatten().tolist()
    assert sum(place.stop - place.start for place in locate(tmp_path, 9, 3)) == 32
    # The walk did begin at a checkpoint: with a position of another order it is refused.
    order = json.loads(batches[3][1]["order"])
    order["order"]["train.seed"] = 99
    state = {f"data.{key}": text for key, text in batches[3][1].items()}
    state["data.order"] = json.dumps(order)
    shutil.rmtree(path := checkpoint_path(tmp_path, 4))
    save(state, checkpoint_id=path, no_dist=True)
    (path / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train\.seed=0: the saved data position has 99"):
        locate(tmp_path, 5)
