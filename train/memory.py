"""Engram's tables in host memory, as the model and its step see them; `train.build` puts them up.

    plan      of a batch, in the thread that prepares it                        `train.memory_plan`
    announce  the next step's plan: its rows begin to travel
    start     the step's rows come to the device, in one copy
    lookup    a microbatch picks its rows; in backward it leaves a gradient for each of them
    reduce    gradients go to the rows' owners; their squares join the norm of all gradients
    update    the owners change their rows, while the next step begins

Rows travel and change in `parallel.engram_service`. The model knows a function only.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.loader import Batch
from parallel.backend.base import Backend
from parallel.engram_plan import StepPlan
from parallel.engram_rows import RowStore
from parallel.engram_service import ServiceStats, TableService
from train.memory_plan import MemoryGeometry, MemoryPlanner
from train.model.engram import Engram
from train.model.tokens import Tokens


class HostMemory:
    """The tables of the pipeline stages of this rank, which share one service.

    Args:
        service: owns rows and their optimizer.
        planner: of this rank's tokens.
        geometry: of the tables.
        backend: of the model's device; says whether copies go through page-locked memory.
        device: of the model.
        dtype: that the model computes in.
        master_dtype: of gradients, and of rows as the service hands them out.
    """

    def __init__(
        self,
        service: TableService[RowStore],
        planner: MemoryPlanner,
        geometry: MemoryGeometry,
        *,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        master_dtype: torch.dtype,
    ) -> None:
        self.service, self.geometry = service, geometry
        self._planner, self._backend, self._device = planner, backend, device
        self._dtype, self._master_dtype = dtype, master_dtype
        self._announced: dict[int, StepPlan] = {}
        self._current: _StepRows | None = None

    def attach(self, layer: int, engram: Engram) -> None:
        """Let a memory of the model look its rows up here."""
        columns = self.geometry.columns(layer)

        def lookup(tokens: Tokens) -> Float[Tensor, "batch part columns head_dim"]:
            assert self._current is not None, "no step has been started"
            picked: Tensor = _Pick.apply(  # type: ignore[no-untyped-call]
                engram.query_norm, self._current, columns, tokens
            )
            return picked

        engram.lookup = lookup

    def plan(self, batch: Batch) -> StepPlan:
        """What this rank's tokens read; any thread may ask, at any time."""
        return self._planner.plan(batch)

    def announce(self, step: int, plan: StepPlan) -> None:
        """Let the rows of the next step begin to travel."""
        self.service.announce(step, plan)
        self._announced[step] = plan

    def start(self, step: int, batch: Batch) -> None:
        """Bring the rows of a step to the device; a step that was not announced is so now."""
        if step not in self._announced:
            self.announce(step, self.plan(batch))
        plan = self._announced.pop(step)
        self._current = self._to_device(self.service.rows(step), plan, len(batch.input_ids))

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """The rows that a batch reads, for passes without gradients between two steps."""
        plan = self.plan(batch)
        rows = self.service.lookup(plan)
        self._current = self._to_device(rows, plan, len(batch.input_ids))
        yield
        self._current = None

    def gradients(
        self,
    ) -> tuple[Int64[np.ndarray, "tokens columns"], Float[np.ndarray, "tokens columns head_dim"]]:
        """Rows that the step's tokens read, and the gradient of each occurrence of one.

        Raises:
            RuntimeError: a microbatch has left no gradient.
        """
        assert self._current is not None, "no step has been started"
        plan = self._current.plan
        self._backend.synchronize()
        return plan.rows[plan.inverse], self._current.gradients(self._master_dtype)

    def reduce(self, step: int) -> float:
        """Give all gradients of the step to the owners of the rows.

        Returns:
            Sum of the squares of the summed gradients of the rows that this rank owns: over all
            ranks, that of the tables' gradients.

        Raises:
            RuntimeError: a microbatch has left no gradient.
        """
        assert self._current is not None, "no step has been started"
        self._backend.synchronize()
        return self.service.reduce(step, self._current.gradients(self._master_dtype))

    def update(self, step: int, *, learning_rate: float, scale: float) -> None:
        """Change the rows by their gradients times `scale`, in the background; ends the step."""
        self.service.update(step, learning_rate=learning_rate, scale=scale)
        self._current = None

    def skip(self, step: int) -> None:
        """End the step without a change."""
        self.service.skip(step)
        self._current = None

    def take_stats(self) -> ServiceStats:
        """What the tables cost since the last call."""
        return self.service.take_stats()

    def close(self) -> None:
        """End the service; what was announced is forgotten."""
        self.service.close()

    def _to_device(self, rows: NDArray[Any], plan: StepPlan, sequences: int) -> "_StepRows":
        inverse = torch.from_numpy(plan.inverse).view(sequences, -1, plan.inverse.shape[1])
        return _StepRows(
            plan,
            self._copied(torch.from_numpy(rows).to(self._dtype)),
            self._copied(inverse),
        )

    def _copied(self, tensor: Tensor) -> Tensor:
        if self._backend.capabilities.pinned_memory:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


class _StepRows:
    """The distinct rows of a step on the device, and what comes back for each of their places.

    Args:
        plan: of the step.
        rows: `[unique, head_dim]`.
        inverse: `[sequences, part, columns]`, which row is read where.
    """

    def __init__(self, plan: StepPlan, rows: Tensor, inverse: Tensor) -> None:
        self.plan, self.rows, self.inverse = plan, rows, inverse
        self._left: dict[tuple[int, int], Tensor] = {}

    def leave(self, first_sequence: int, column: int, gradient: Tensor) -> None:
        """Keep the gradient of what a microbatch picked for one layer, on its way to the host."""
        place = first_sequence, column
        assert place not in self._left, f"two backward passes for sequence and column {place}"
        self._left[place] = gradient.detach().to("cpu", non_blocking=True)

    def gradients(self, dtype: torch.dtype) -> NDArray[Any]:
        """What was left, for every token and column; the device has done all it was given.

        Raises:
            RuntimeError: something is missing.
        """
        whole = torch.empty((*self.inverse.shape, self.rows.shape[1]), dtype=dtype)
        missing = whole.numel()
        for (sequence, column), gradient in self._left.items():
            sequences, _, columns, _ = gradient.shape
            whole[sequence : sequence + sequences, :, column : column + columns] = gradient
            missing -= gradient.numel()
        if missing:
            raise RuntimeError(
                f"no gradient after backward for {missing} of {whole.numel()} numbers of Engram's "
                "rows: a memory did not take part in the loss"
            )
        return whole.flatten(0, 1).numpy()


class _Pick(torch.autograd.Function):
    """Rows of one layer for the tokens of a microbatch.

    Backward leaves their gradients with the step and returns none. It runs when the gradient of
    `anchor` is asked for: schedules that compute gradients of inputs and of weights apart ask for
    those of parameters only. It must be the first parameter of the memory: torch walks parameters
    in order, and one that joined two groups of earlier ones would be asked for in both.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, step: _StepRows, columns: slice, tokens: Tokens
    ) -> Tensor:
        ctx.step, ctx.place = step, (tokens.first_sequence, columns.start)
        first = tokens.first_sequence
        places = step.inverse[first : first + len(tokens.input_ids), :, columns]
        return F.embedding(places, step.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.step.leave(*ctx.place, gradient)
        return None, None, None, None
