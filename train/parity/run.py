"""Entry point of a rank of `mneme parity`: `python -m train.parity.run RUN_DIR`.

Trains the recipe's first optimizer steps with the recipe's own step, loader and start values, and
shows every tensor to a ledger: the reference writes it down, a layout compares.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from train.build import build
from train.checkpoint.state import Progress
from train.config import RunConfig
from train.lifetime import leave
from train.loop import open_batches
from train.metrics import MetricsLog
from train.parity.memory import table_gradients, table_rows
from train.parity.outputs import OutputWatch
from train.parity.task import Findings, Kind, Task
from train.parity.tensors import Comparison, Ledger, Reference, gathered
from train.run import run_rank
from train.stages import Phase
from train.step import train_step
from train.stop import STOPPED_EXIT_CODE, StopRequest
from train.training import Training


def compare(config: RunConfig, run_dir: Path, stop: StopRequest) -> int:
    """Train the steps of the run's task; what was found is in `run_dir`.

    There is nothing to save, so a stop request ends the process at once, with exit code 85.

    Args:
        config: the recipe, with the layout of this run.
        run_dir: holds the task.
        stop: the requests until now.

    Returns:
        0.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: leave(STOPPED_EXIT_CODE))
    if stop.signal_name is not None:
        leave(STOPPED_EXIT_CODE)
    task = Task.load(run_dir)
    training = build(config)
    start = Progress(step=0, tokens=0, data_state={})
    with ExitStack() as stack:
        findings = stack.enter_context(Findings(run_dir, dist.get_rank()))
        first = dist.get_rank() == 0
        log = stack.enter_context(MetricsLog(run_dir, [], 0)) if first else None
        recorder = _Recorder(training, task, run_dir, findings)
        batches = islice(open_batches(training, start), task.steps)
        for step, (phase, batch, _) in enumerate(batches, start=1):
            recorder.start_step(step, phase)
            record = train_step(training, batch, step, on_gradients=recorder.gradients)
            recorder.parameters()
            if log:
                log.write({"step": step, "tokens": step * phase.tokens_per_step, **record})
    return 0


class _Recorder:
    """Shows the tensors of a step to the ledger of the run."""

    def __init__(self, training: Training, task: Task, run_dir: Path, findings: Findings) -> None:
        self._training, self._task, self._run_dir = training, task, run_dir
        self._findings = findings
        self._ledger: Ledger = Reference(run_dir, findings)
        self._step = self._first_microbatch = 0
        self._watches = [OutputWatch(stage, self._output) for stage in training.model.stages]

    def start_step(self, step: int, phase: Phase) -> None:
        """Get ready for the batch of a step."""
        self._step = step
        count = partial(_first_microbatches, phase)
        chosen = {0}
        if self._task.reference is None:
            chosen = {first for size in self._task.data_sizes for first in count(size)}
        else:
            training = self._training
            self._first_microbatch = count(training.data_size)[training.data_rank]
            tensor = training.meshes.tp
            self._ledger = Comparison(
                Path(self._task.reference),
                self._findings,
                training.model.stages[0].split.of(phase.sequence_length),
                (tensor.get_local_rank(), tensor.size()),
            )
        for watch in self._watches:
            watch.start_step(chosen)

    def gradients(self) -> None:
        """Show all gradients."""
        parameters = self._training.model.named_parameters()
        found = {name: p.grad for name, p in parameters if p.grad is not None}
        found |= table_gradients(self._training)
        assert found or self._task.reference is not None, "the reference has no gradients"
        self._whole("gradient", found)

    def parameters(self) -> None:
        """Show all parameters, tables, and persistent buffers, which the step moves as well."""
        self._whole("parameter", dict(_state(self._training)) | table_rows(self._training))

    def _output(self, microbatch: int, name: str, value: Tensor) -> None:
        self._ledger.output(self._step, self._first_microbatch + microbatch, name, value)

    def _whole(self, kind: Kind, tensors: dict[str, Tensor]) -> None:
        if self._task.reference is None:
            # In the order of execution, which is not always that of definition.
            [watch] = self._watches
            tensors = dict(sorted(tensors.items(), key=lambda item: watch.place_of(item[0])))
        for name, value in gathered(tensors):
            self._ledger.whole(self._step, kind, name, value)


def _first_microbatches(phase: Phase, data_size: int) -> list[int]:
    """Place of each data rank's first microbatch among all; empty if the sizes do not divide."""
    total, rest = divmod(phase.global_batch_size, phase.micro_batch_size * data_size)
    return [] if rest else [rank * total for rank in range(data_size)]


def _state(training: Training) -> Iterator[tuple[str, Tensor]]:
    model = training.model
    yield from model.named_parameters()
    names = model.state_dict().keys() - dict(model.named_parameters()).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in names)


if __name__ == "__main__":
    run_rank(lambda: compare)
