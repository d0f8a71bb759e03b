"""The end of a step: what all ranks do next, and what they did together. Called by `train.loop`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.loader import Batch
from parallel.collectives import sum_over
from parallel.volume import Axis
from train.config import AlarmAction
from train.metrics import Record
from train.stop import ALARM_EXIT_CODE, STOPPED_EXIT_CODE, StopRequest
from train.training import Training


@dataclass(frozen=True)
class Wishes:
    """What some rank asks of all of them."""

    exit_code: int
    """0: go on."""
    save: bool
    save_failed: bool
    """Some rank could not save a checkpoint."""


def end_step(
    training: Training,
    stop: StopRequest,
    actions: Sequence[AlarmAction],
    sent: Mapping[Axis, float],
    batch: Batch,
    *,
    save_failed: bool,
) -> tuple[Wishes, Record]:
    """What to do after a step, the mean over ranks of the bytes sent, and the data seen.

    The same on all ranks. Axes over which nothing was sent are left out.

    Communication: one all-reduce of thirteen numbers, and one for each source, over the world.

    Args:
        training: says the device.
        stop: the request to this rank, if there was one.
        actions: of the alarms that this rank has raised.
        sent: by this rank during the step.
        batch: of this rank.
        save_failed: whether this rank knows that a checkpoint was not saved.
    """
    wishes = (stop.requested, "stop" in actions, "save" in actions, save_failed)
    seen = (batch.checksum, len(batch.faults), batch.input_ids.numel(), *batch.source_tokens)
    seen = seen if training.counts_data else (0,) * len(seen)
    numbers = [float(number) for number in (*wishes, *sent.values(), *seen)]
    totals = sum_over(torch.tensor(numbers, dtype=training.sum_dtype, device=training.device))
    stopped, alarmed, saved, failed, *others = totals.tolist()
    exit_code = STOPPED_EXIT_CODE if stopped else ALARM_EXIT_CODE if alarmed else 0
    all_sent, (checksum, skipped, tokens, *by_source) = others[: len(sent)], others[len(sent) :]
    ranks, names = dist.get_world_size(), sorted(training.config.data.sources)
    record: Record = {
        f"comm/{axis}_bytes": total / ranks
        for axis, total in zip(sent, all_sent, strict=True)
        if total
    }
    record |= {f"data/{n}_tokens": total for n, total in zip(names, by_source, strict=True)}
    record |= {
        "data/checksum": checksum,
        "data/skipped_samples": skipped,
        "data/packing_efficiency": sum(by_source) / tokens,
    }
    return Wishes(exit_code, save=bool(exit_code or saved), save_failed=bool(failed)), record
