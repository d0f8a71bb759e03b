"""The training loop of one rank, top to bottom."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.faults import Fault
from data.lanes import NoDocumentsLeftError
from data.loader import Batch, build_loader, fingerprint
from data.prefetch import prefetch
from parallel.engram_plan import StepPlan
from parallel.traffic import take_sent
from train.build import build
from train.checkpoint.saver import CheckpointSaver, Committed
from train.checkpoint.state import Progress, restore
from train.config import RunConfig
from train.end_step import end_step
from train.evaluate import evaluate
from train.events import append_event
from train.memory import HostMemory
from train.metrics import MetricsLog, Record, open_sinks
from train.monitor.alarms import Alarms
from train.recall import learned
from train.stages import Phase, phases
from train.step import train_step
from train.stop import StopRequest
from train.training import Training
from train.utilization import Peak, find_peak, utilization

Item = tuple[Phase, Batch, dict[str, str]]
"""A batch, its phase, and the positions in the data after it."""


def train(config: RunConfig, run_dir: Path, stop: StopRequest) -> int:
    """Train from the newest checkpoint of `run_dir`, or from the start, to the last step.

    Returns:
        The exit code of this rank: 0 done, 85 stopped on request with a checkpoint saved, 86 the same
        for an alarm.
    """
    training = build(config)
    corpus = fingerprint(config.data)
    progress = resume(training, run_dir, corpus)
    with ExitStack() as stack:
        if training.tables:
            stack.callback(training.tables.close)
        peak = find_peak(training)
        log = open_log(training, run_dir, progress.step, peak, stack)
        committed = partial(log_checkpoint, run_dir)
        saver = CheckpointSaver(training, run_dir, corpus=corpus, committed=committed)
        stack.enter_context(saver)
        alarms = Alarms(config.monitor.alarms)
        batches = open_batches(training, progress)
        exit_code = 0
        while progress.step < config.train.steps and exit_code == 0:
            started = time.perf_counter()
            phase, batch, data_state = next(batches)
            fetched = time.perf_counter()
            step = progress.step + 1
            take_sent()  # what came between two steps belongs to none
            record = train_step(training, learned(config, batch), step)
            sent = take_sent()
            tokens = progress.tokens + phase.tokens_per_step
            progress = Progress(step=step, tokens=tokens, data_state=data_state)
            record |= batch_shape(phase)
            record |= timing(training, phase.tokens_per_step, started, fetched)
            record["model_flops_utilization"] = utilization(training, phase, record, peak)
            report_faults = partial(log_faults, training, run_dir, step)
            report_faults(batch.faults)
            if due(step, config.evaluate.every_steps, config.train.steps):
                record |= evaluate(training, report_faults)
            raised = alarms.check(record) if log else []
            for alarm in raised:
                append_event(run_dir, step=step, rank=0, event="alarm", detail=alarm.detail)
            actions = [alarm.action for alarm in raised]
            wishes, totals = end_step(
                training, stop, actions, sent, batch, save_failed=saver.failed
            )
            if log:
                log.write({"step": step, "tokens": progress.tokens, **record, **totals})
                log_expert_load(training, log, step)
            saver.check(wishes.save_failed)
            exit_code = wishes.exit_code
            if wishes.save or due(step, config.checkpoint.every_steps, config.train.steps):
                saver.save(progress, stop.signal_name or ("an alarm" if wishes.save else None))
                if log:
                    for line in alarms.unseen():
                        append_event(run_dir, step=step, rank=0, event="alarm_unseen", detail=line)
    if training.memory is not None:
        training.memory.close()
    return exit_code


def resume(training: Training, run_dir: Path, corpus: str) -> Progress:
    """Load the newest checkpoint into `training`; the start of the run where there is none."""
    rng_state = training.backend.rng_state()
    progress = restore(
        run_dir,
        training.model,
        training.engine,
        training.data_lanes(),
        rng_state=rng_state,
        tables=training.tables,
        corpus=corpus,
    )
    training.backend.set_rng_state(rng_state)
    training.backend.reset_peak_memory()
    return progress or Progress(step=0, tokens=0, data_state={})


def open_log(
    training: Training, run_dir: Path, restored_step: int, peak: Peak, stack: ExitStack
) -> MetricsLog | None:
    """The metrics log on rank 0, None elsewhere."""
    if dist.get_rank() != 0:
        return None
    append_event(
        run_dir,
        step=restored_step,
        rank=0,
        event="resume" if restored_step else "start",
        detail=f"{dist.get_world_size()} ranks on {training.backend.name}, {peak}",
    )
    if training.tables and training.tables.fresh_because:
        detail = "; ".join(training.tables.fresh_because)
        append_event(run_dir, step=restored_step, rank=0, event="fresh_tables", detail=detail)
    sinks = open_sinks(run_dir, training.config, asdict(training.config), restored_step)
    return stack.enter_context(MetricsLog(run_dir, sinks, restored_step))


def open_batches(training: Training, progress: Progress) -> Iterator[Item]:
    """This rank's part of every global batch after `progress`, with its phase.

    With Engram's tables in host memory, the plan of what a batch reads is made where the batch is,
    and announced while the step before has yet to run. What was only looked at is not counted as
    seen: the positions in the data go with the batch.
    """
    planned = _planned_batches(training, progress)
    if training.memory is None:
        yield from (item for item, _ in planned)
        return
    before = None
    for step, (item, plan) in enumerate(planned, start=progress.step + 1):
        assert plan is not None, "planned for the memory"
        training.memory.announce(step, plan)
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def _planned_batches(
    training: Training, progress: Progress
) -> Iterator[tuple[Item, StepPlan | None]]:
    """Batches and what they read of the tables in host memory, if there are any.

    Where batches change their shape a new loader goes on at the lanes' positions: no document is
    lost or read twice, and the positions do not depend on the shapes.
    """
    config, data_state = training.config, progress.data_state or None
    for phase in phases(config):
        steps = range(max(phase.first_step, progress.step + 1), phase.last_step + 1)
        if not steps:
            continue
        loader = build_loader(
            replace(
                config.data,
                sequence_length=phase.sequence_length,
                num_lanes=training.num_lanes,
                # Without workers the thread below is the one that prepares ahead.
                prefetch_batches=config.data.prefetch_batches if config.data.num_workers else 0,
            ),
            split="train",
            seed=config.train.seed,
            global_batch_size=phase.global_batch_size,
            data_rank=training.data_rank,
            data_size=training.data_size,
            state=data_state,
            vision=training.vision,
        )
        ahead = prefetch(_with_plans(training.memory, loader), config.data.prefetch_batches)
        for step in steps:
            try:
                batch, data_state, plan = next(ahead)
            except NoDocumentsLeftError as error:
                raise NoDocumentsLeftError(f"step {step}: {error}") from error
            yield (phase, batch, data_state), plan
        del ahead  # ends its thread, and what it prepared ahead is prepared again


def _with_plans(
    memory: HostMemory | None, loader: Iterator[tuple[Batch, dict[str, str]]]
) -> Iterator[tuple[Batch, dict[str, str], StepPlan | None]]:
    for batch, data_state in loader:
        yield batch, data_state, None if memory is None else memory.plan(batch)


def batch_shape(phase: Phase) -> Record:
    """Which part of the run a step belongs to."""
    return {
        "stage": phase.stage,
        "sequence_length": phase.sequence_length,
        "global_batch_size": phase.global_batch_size,
    }


def timing(training: Training, tokens: int, started: float, fetched: float) -> Record:
    """Speed of the step that just ended, evaluation and checkpoint not included."""
    training.backend.synchronize()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": fetched - started,
        "peak_memory_bytes": training.backend.peak_memory_bytes(),
    }


def log_expert_load(training: Training, log: MetricsLog, step: int) -> None:
    """Write the load of every expert, in the steps in which the recipe wants it."""
    config = training.config
    if due(step, config.monitor.expert_load_every_steps, config.train.steps):
        log.write_expert_load(step, training.expert_load.take())


def log_checkpoint(run_dir: Path, found: Committed, reason: str | None) -> None:
    """Write a commit into `events.jsonl`; called on rank 0 by the thread that saves."""
    append_event(
        run_dir,
        step=found.step,
        rank=0,
        event="checkpoint",
        detail=f"{found.path.name} on {reason}" if reason else found.path.name,
        blocked_seconds=f"{found.blocked_seconds:.3f}",
        total_seconds=f"{found.total_seconds:.3f}",
    )


def log_faults(training: Training, run_dir: Path, step: int, faults: Iterable[Fault]) -> None:
    """Write the samples that were left out into `events.jsonl`, once for each rank that reads them."""
    if training.counts_data:
        for fault in faults:
            append_event(
                run_dir,
                step=step,
                rank=dist.get_rank(),
                event="skipped_sample",
                detail=fault.detail,
                source=fault.source,
                shard=fault.shard,
                key=fault.key,
                cause=fault.cause,
            )


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never), and at the end, is done now."""
    return every > 0 and (step % every == 0 or step == last)
