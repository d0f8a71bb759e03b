"""Which documents a step of a run was trained on. `mneme data stats RUN_DIR --step T` calls this."""

from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load

from data.locate import BatchShape, Place
from data.locate import locate as locate_in
from data.pictures import has_pictures, picture_documents, picture_lengths
from data.resume import owned_items
from train.checkpoint.commit import complete_checkpoints, holds_only_weights
from train.config import RunConfig
from train.pictures import vision_geometry
from train.recipe import load_resolved
from train.stages import phases


def locate(run_dir: Path, step: int, sample: int | None = None) -> list[Place]:
    """The pieces of a sequence, or of all, of the global batch of a step, in order.

    The walk begins at the newest checkpoint before the step, or at the start of the run.

    Args:
        run_dir: with its recipe; relative paths in it refer to the working directory.
        step: 1 to `train.steps`.
        sample: which sequence of the global batch; None: all.

    Raises:
        ValueError: no such step or sample; corpus or checkpoint do not fit the recipe.
        DamagedSampleError: a sample on the way is damaged and not to be skipped.
    """
    config = load_resolved(run_dir / "recipe.yaml")
    num_lanes = config.data.num_lanes or config.train.global_batch_size
    before = 0
    state: dict[str, str] | None = None
    if checkpoint := _checkpoint_before(run_dir, step):
        before, path = checkpoint
        state = _positions(path, num_lanes)
    vision = vision_geometry(config.model) if has_pictures(config.data) else None
    return locate_in(
        config.data,
        seed=config.train.seed,
        num_lanes=num_lanes,
        shapes=_shapes(config, after=before),
        step=step,
        sample=sample,
        state=state,
        lengths=picture_lengths(config.data, vision),
        pictures=picture_documents(config.data, vision),
    )


def _checkpoint_before(run_dir: Path, step: int) -> tuple[int, Path] | None:
    found = [
        (saved, path)
        for saved, path in complete_checkpoints(run_dir)
        if saved < step and not holds_only_weights(path)
    ]
    return found[-1] if found else None


def _positions(checkpoint: Path, num_lanes: int) -> dict[str, str]:
    keys = owned_items(num_lanes, data_rank=0, data_size=1)
    state = {f"data.{key}": "" for key in keys}
    load(state, checkpoint_id=checkpoint, no_dist=True)
    return {key: state[f"data.{key}"] for key in keys}


def _shapes(config: RunConfig, *, after: int) -> list[BatchShape]:
    return [
        BatchShape(
            steps=range(max(after + 1, phase.first_step), phase.last_step + 1),
            sequence_length=phase.sequence_length,
            global_batch_size=phase.global_batch_size,
        )
        for phase in phases(config)
        if phase.last_step > after
    ]
