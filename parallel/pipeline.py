"""The runtime of pipeline parallelism: what runs this rank's stages; built by `train.build`.

torch.distributed.pipelining orders the passes of the microbatches and sends tensors between stages.
It is told of a microbatch by its number only: `train.microbatches` knows what is in it, and calls the
stage. Shapes are given, not inferred: inference would run the model once more, on garbage, and count
it.

Every stage is an FSDP2 root of its own. The schedules keep its parameters gathered from the first
backward pass of a step to the last, and sum the gradients over ranks after that.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from parallel.config import PipelineSchedule
from parallel.pipeline_stages import PipelineStages
from parallel.torch_compat import PromptDualPipeV, accumulate_in_reduce_dtype
from parallel.traffic import count_sent

Tensors = tuple[Tensor, ...]
Compute = Callable[[nn.Module, int, Tensors], Tensors | Tensor]
"""(stage, number of the microbatch, what the stage before handed on; empty for the first) -> what
the stage hands on, or, of the last stage, the losses."""

Loss = Callable[[Tensor], Tensor]
"""(losses of a microbatch) -> what is minimised."""

SCHEDULES: dict[PipelineSchedule, Callable[..., Any]] = {
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": PromptDualPipeV,
}


class Pipeline:
    """This rank's stages, and the schedule that runs them.

    Args:
        stages: the places of all stages.
        modules: those of this rank, in order.
        schedule: by which microbatches are ordered.
        group: the ranks of the pipeline, one of each place.
        device: of this rank.
    """

    def __init__(
        self,
        stages: PipelineStages,
        modules: Sequence[nn.Module],
        schedule: PipelineSchedule,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.stages, self.schedule, self.group, self.device = stages, schedule, group, device
        self.modules = dict(zip(stages.of_rank(group.rank()), modules, strict=True))
        self._built: tuple[object, Any] | None = None

    def forward_backward(
        self,
        compute: Compute,
        loss: Loss,
        *,
        crossing: Tensors,
        num_microbatches: int,
    ) -> None:
        """Add the gradients of all microbatches to the parameters, summed over ranks.

        Communication: between neighbouring stages, what each microbatch hands on, and its gradient
        back; once for each pair of shapes and numbers, two integers. And that of the model.

        Args:
            compute: runs a stage on a microbatch; called in the schedule's order.
            loss: what is minimised, from the losses of a microbatch; called for the last stage, in
                the order of the microbatches.
            crossing: shapes and types of what one stage hands to the next for a microbatch.
            num_microbatches: the schedule takes so many, see `pipeline_stages.takes`.
        """
        key = (num_microbatches, tuple((tensor.shape, tensor.dtype) for tensor in crossing))
        if self._built is None or self._built[0] != key:
            # Only the last one is kept: it holds a buffer for each microbatch.
            self._built = (key, self._build(crossing, num_microbatches))
        numbers = torch.arange(num_microbatches)
        self._built[1].step(
            number=numbers,
            compute=compute,
            target=numbers,
            loss_kwargs={"loss": loss},
            return_outputs=False,
        )

    def _build(self, crossing: Tensors, num_microbatches: int) -> Any:
        crossing = tuple(torch.empty_like(t, requires_grad=True) for t in crossing)
        losses = (torch.empty(0, device="meta", requires_grad=True),)
        last = len(self.stages.layers) - 1
        own = [
            _Stage(
                module,
                index,
                last + 1,
                self.device,
                input_args=crossing if index else (),
                output_args=crossing if index < last else losses,
                group=self.group,
            )
            for index, module in self.modules.items()
        ]
        # 1F1B takes the one stage that a rank has, all others take lists.
        given = own[0] if self.schedule == "1f1b" else own
        kind = SCHEDULES[self.schedule]
        return kind(given, num_microbatches, loss_fn=_minimised, scale_grads=False)

    @torch.no_grad()
    def forward(self, compute: Compute, crossings: Sequence[Tensors]) -> list[Tensor]:
        """Losses of all microbatches, without gradients; empty where the last stage is not.

        Any number of microbatches, of any sizes: stage by stage, all microbatches each.

        Communication: between neighbouring stages, what each microbatch hands on. And that of the
        model.

        Args:
            compute: runs a stage on a microbatch.
            crossings: as `crossing` above, of each microbatch.
        """
        transfers: list[tuple[dist.Work | None, Tensor]] = []
        made: list[Tensors] = []
        losses: list[Tensor] = []
        for index, module in self.modules.items():
            # Transfers between two ranks may be one queue: if a stage sends where it receives from,
            # all of one way come first.
            one_peer = index and self.stages.rank_of(index - 1) == self.stages.rank_of(index + 1)
            before, made = made, []
            for number, crossing in enumerate(crossings):
                here = index - 1 in self.modules
                received = before[number] if here else self._receive(index, crossing)
                result = compute(module, number, received)
                if isinstance(result, Tensor):
                    losses.append(result)
                    continue
                made.append(result)
                if not one_peer:
                    transfers += self._send(index, result)
            if one_peer:
                transfers += [work for result in made for work in self._send(index, result)]
        for work, _ in transfers:
            if work is not None:
                work.wait()
        return losses

    def _send(self, index: int, tensors: Tensors) -> list[tuple[dist.Work | None, Tensor]]:
        """Hand on what a stage made, if the next is elsewhere: transfers, and what must live on."""
        if index + 1 in self.modules:
            return []
        peer, whole = self.stages.rank_of(index + 1), [tensor.contiguous() for tensor in tensors]
        count_sent("pp", sum(tensor.nbytes for tensor in whole))
        return [(dist.isend(t, group=self.group, group_dst=peer), t) for t in whole]

    def _receive(self, index: int, crossing: Tensors) -> Tensors:
        """What the stage before a stage hands on, if there is one."""
        if index == 0:
            return ()
        received = tuple(torch.empty_like(like, device=self.device) for like in crossing)
        for tensor in received:
            dist.recv(tensor, group=self.group, group_src=self.stages.rank_of(index - 1))
        return received


def _minimised(losses: Tensor, number: Tensor, loss: Loss) -> Tensor:
    """The loss of a microbatch, as torch calls it: target and keyword arguments of the step."""
    return loss(losses)


class _Stage(PipelineStage):
    """A stage whose module is called by `compute`."""

    def forward_maybe_with_nosync(
        self, *received: Tensor, number: Tensor, compute: Compute
    ) -> Tensors | Tensor:
        """Run the module, as torch calls it: what was received, keyword arguments of the step."""
        entered = tuple(_crossing(tensor) for tensor in received)
        result = compute(self.submod, int(number), entered)
        if isinstance(result, Tensor):
            return result
        return tuple(_crossing(tensor) for tensor in result)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What goes to the next stage, as torch asks for it."""
        return _counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What goes back to the stage before."""
        return _counted(super().get_bwd_send_ops(bwd_chunk_id))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The gradients of weights alone, of one microbatch; the next may follow at once.

        Without the second line they would add up in the type that the model computes in.
        """
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        accumulate_in_reduce_dtype(self.submod)


def _counted(sends: list[dist.P2POp]) -> list[dist.P2POp]:
    count_sent("pp", sum(send.tensor.nbytes for send in sends))
    return sends


def _crossing(x: Tensor) -> Tensor:
    """`x` itself, contiguous and no view; its gradient becomes contiguous, too.

    The runtime sends both, and detaches in place what it has sent.
    """
    result: Tensor = _Crossing.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
