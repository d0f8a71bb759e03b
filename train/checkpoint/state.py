"""What a checkpoint holds: one flat dictionary with global names, written by torch DCP.

    model.<name>            parameters (sharded; DCP reshards them when the layout changes)
    optim.<key>.<name>      state of its optimizer: exp_avg, exp_avg_sq and step, or momentum_buffer
    buffer.<name>           persistent buffers, such as the router's load-balancing bias
    data.order              what the order of the data is a function of, as JSON, and its progress
    data.lane/<number>      the position of each virtual lane of the data, as JSON
    rng.<rank>              random-number state of each rank's device

plus `checkpoint.json` (step, tokens, what the corpus was), `manifest.json` (all files, see `manifest`),
and `engram/` (see `tables`) for models with Engram. `saver` writes it. A checkpoint that was imported has only
weights, the first and third kind: training starts from it at step 0, with the optimizer's states at
zero and from the beginning of the data. The learning rate is a function of the step and has no
state. Random-number states are restored in a world of the same size only; nothing that the model
learns from depends on them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from train.checkpoint.commit import Choice, choose, clean_up, holds_only_weights
from train.checkpoint.files import DirectReader
from train.checkpoint.tables import TableCheckpoint
from train.engine import DataEngine
from train.events import append_event
from train.rank_model import RankModel

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after an optimizer step."""

    step: int
    tokens: int
    """Tokens of all ranks since the start."""
    data_state: dict[str, str]
    """Key -> JSON: the order, and the lanes that this rank owns."""


def state_of(
    model: RankModel, engine: DataEngine, progress: Progress, rng_state: Tensor
) -> dict[str, Any]:
    """What this rank saves after `progress.step`, by its names in the checkpoint; live tensors.

    Args:
        model: of the engine.
        engine: of parameters and optimizer.
        progress: of the run.
        rng_state: of this rank's device.
    """
    state: dict[str, Any] = engine.state() | _buffers(model)
    state |= {f"data.{lane}": position for lane, position in progress.data_state.items()}
    state[f"rng.{dist.get_rank()}"] = rng_state
    return state


def write_meta(
    directory: Path,
    *,
    step: int,
    tokens: int,
    corpus: str,
    world_size: int,
    only_weights: bool = False,
) -> None:
    """Write `checkpoint.json`.

    Args:
        directory: of the checkpoint, not yet committed.
        step: optimizer steps so far.
        tokens: tokens of all ranks so far.
        corpus: fingerprint of the corpus.
        world_size: ranks, whose random-number states are saved.
        only_weights: there is nothing but parameters and buffers.
    """
    meta = {
        "format": FORMAT_VERSION,
        "step": step,
        "tokens": tokens,
        "corpus": corpus,
        "world_size": world_size,
        "only_weights": only_weights,
    }
    (directory / "checkpoint.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def restore(
    run_dir: Path,
    model: RankModel,
    engine: DataEngine,
    lanes: Iterable[str],
    *,
    rng_state: Tensor,
    tables: TableCheckpoint | None,
    corpus: str,
) -> Progress | None:
    """Load the newest checkpoint that is whole in place; None where there is none.

    What a kill left is removed first, and damaged checkpoints are set aside; both is written to
    `events.jsonl`.

    From a checkpoint of only weights, the optimizer's states and `rng_state` stay as they are and
    there are no data positions.

    Args:
        run_dir: the run.
        model: of the engine; its parameters and buffers are overwritten.
        engine: the states of its optimizer are overwritten.
        lanes: keys of the positions in the data that this rank owns.
        rng_state: overwritten with this rank's, if the world has the size that it was saved with.
        tables: of the model; those in host memory must be at zero, and are overwritten.
        corpus: fingerprint of today's corpus.

    Communication: a broadcast over the world, and DCP's.

    Raises:
        ValueError: the checkpoint's corpus is another one, so its data positions mean nothing here; or
            its Engram tables are, or some of their files is missing or damaged; or no checkpoint
            is whole. On all ranks alike.
    """
    newest = _newest(run_dir)
    if newest is None:
        return None
    step, path = newest
    meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format {meta['format']}; this version reads {FORMAT_VERSION}; go on "
            "with the version that saved it, or start a new run"
        )
    if tables:
        tables.check(path, run_dir)
    if holds_only_weights(path):
        state = engine.state(only_weights=True) | _buffers(model)
        load(state, storage_reader=DirectReader(path))
        engine.load_state(state)
        if tables:
            tables.restore(path)
        return Progress(step=step, tokens=meta["tokens"], data_state={})
    if meta["corpus"] != corpus:
        raise ValueError(
            f"data.sources: the corpus or tokenizer changed since {path} was saved (fingerprint "
            f"{meta['corpus'][:12]}, now {corpus[:12]}); put the old corpus back, or start a new run"
        )
    state = engine.state() | _buffers(model) | {f"data.{lane}": "" for lane in lanes}
    if meta["world_size"] == dist.get_world_size():
        state[f"rng.{dist.get_rank()}"] = rng_state
    load(state, storage_reader=DirectReader(path))
    engine.load_state(state)
    if tables:
        tables.restore(path)
    positions = {k.removeprefix("data."): v for k, v in state.items() if k.startswith("data.")}
    return Progress(step=step, tokens=meta["tokens"], data_state=positions)


def _newest(run_dir: Path) -> tuple[int, Path] | None:
    """Where to resume, as rank 0 finds it: the others need not see the same directory at the same time.

    Communication: a broadcast over the world.

    Raises:
        ValueError: no checkpoint is whole; on all ranks alike.
    """
    answer: list[tuple[tuple[int, Path] | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            choice = choose(run_dir)
            clean_up(run_dir, choice)
            _report(run_dir, choice)
            answer = [(choice.newest, "")]
        except (ValueError, OSError) as error:
            answer = [(None, str(error))]
    dist.broadcast_object_list(answer)
    newest, problem = answer[0]
    if problem:
        raise ValueError(problem)
    return newest


def _report(run_dir: Path, choice: Choice) -> None:
    """Write what is not resumed from into `events.jsonl`."""
    step = choice.newest[0] if choice.newest else 0
    for skipped in choice.damaged:
        detail = f"{skipped}; kept as {skipped.path.name}.damaged"
        append_event(run_dir, step=step, rank=0, event="skipped_checkpoint", detail=detail)
    for skipped in choice.leftovers:
        detail = f"{skipped}; removed"
        append_event(run_dir, step=step, rank=0, event="skipped_checkpoint", detail=detail)


def _buffers(model: RankModel) -> dict[str, Any]:
    """The live persistent buffers by their global names; DCP loads into them in place."""
    persistent = model.state_dict().keys()
    buffers = ((name, value) for name, value in model.named_buffers() if name in persistent)
    return {f"buffer.{name}": value for name, value in buffers}
