"""What is computed while rows travel: the order, the same results, and who may touch the buffers."""

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.expert import AllToAllDispatcher
from tests.harness import run_distributed
from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, with_changes
from train.model.moe.config import MoeConfig
from train.model.moe.layer import MoeLayer

EXPERTS, HIDDEN = 4, TINY.hidden_size
all_to_all_single = dist.all_to_all_single


def layer_of(rank: int, world_size: int, dtype: torch.dtype = torch.float64) -> MoeLayer:
    """A layer with this rank's experts; everything else is equal on all ranks."""
    moe = MoeConfig(num_experts=EXPERTS, num_experts_per_token=2, expert_intermediate_size=16)
    layer = MoeLayer(with_changes(TINY, moe=moe), 1)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.to(dtype)
    size = EXPERTS // world_size
    for name, parameter in list(layer.experts.named_parameters()):
        own = parameter.data[rank * size : (rank + 1) * size].clone()
        layer.experts.register_parameter(name, nn.Parameter(own))
    group = dist.group.WORLD
    assert group is not None
    layer.dispatch = AllToAllDispatcher(group, EXPERTS)
    return layer


def trained(
    layer: MoeLayer, tokens: int, dtype: torch.dtype = torch.float64, recompute: bool = False
) -> list[Tensor]:
    """Output and all gradients of one pass over this rank's tokens."""
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype, requires_grad=True)
    layer.balance_scale = 0.1
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    if recompute:
        out = checkpoint(layer, x, tokens_of(ids, ids), use_reentrant=False)
    else:
        out = layer(x, tokens_of(ids, ids))
    leaves = [x, *layer.parameters()]
    loss = (out.sin() * torch.arange(1, HIDDEN + 1)).sum()
    return [out, *torch.autograd.grad(loss, leaves)]


class Recorder:
    """Stands for `dist.all_to_all_single`; notes when rows leave and when they are waited for."""

    def __init__(self, before_leaving: Callable[[int], None] = lambda exchange: None) -> None:
        self.events: list[str] = []
        self.exchanges = 0
        self.before_leaving = before_leaving

    def __call__(self, received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not sent.is_floating_point():
            return all_to_all_single(received, sent, *args, **kwargs)
        self.exchanges += 1
        self.before_leaving(self.exchanges)
        self.events.append(f"leave {self.exchanges}")
        work = all_to_all_single(received, sent, *args, **kwargs)
        return RecordedWork(work, self.events, f"arrive {self.exchanges}")


class RecordedWork:
    def __init__(self, work: Any, events: list[str], name: str) -> None:
        self.work, self.events, self.name = work, events, name

    def wait(self) -> None:
        self.events.append(self.name)
        self.work.wait()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}: nothing ran while the rows travelled"
        time.sleep(0.001)


def overlapped(rank: int, directory: Path) -> list[str]:
    """Rank 1 joins an exchange only when the shared expert of rank 0 has been computed.

    If rank 0 waited for the exchange before that, both would wait for ever.
    """
    files = {1: directory / "forward", 4: directory / "backward"}
    late = (lambda n: wait_for(files[n]) if n in files else None) if rank else (lambda n: None)
    recorder = Recorder(late)
    dist.all_to_all_single = recorder  # type: ignore[assignment]
    layer = layer_of(rank, 2)
    shared = layer.shared
    assert shared is not None

    def note(event: str, file: Path | None) -> None:
        recorder.events.append(event)
        if rank == 0 and file is not None:
            file.touch()

    shared.register_forward_hook(lambda *args: note("shared", files[1]))
    last = shared.gate.weight  # of the backward pass, as it is the first of the forward pass
    for parameter in shared.parameters():
        file = files[4] if parameter is last else None
        parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda grad, file=file: note("shared gradient", file)
        )
    trained(layer, 5)
    return recorder.events


def test_the_shared_expert_runs_while_tokens_and_gradients_travel(tmp_path: Path) -> None:
    forward = ["leave 1", "shared", "arrive 1", "leave 2", "arrive 2"]
    backward = ["leave 3", "arrive 3", "leave 4", *3 * ["shared gradient"], "arrive 4"]
    assert run_distributed(overlapped, 2, tmp_path) == [forward + backward] * 2


def at_once(dispatch: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
    """The same dispatch, finished before anything else is computed."""

    def finished(*args: Any) -> Callable[[], Tensor]:
        out = dispatch(*args)()
        return lambda: out

    return finished


class LateWork:
    """A collective that does everything at the last moment, and keeps no buffer alive."""

    def __init__(self, received: Tensor, sent: Tensor, collective: Callable[..., Any]) -> None:
        received.fill_(float("nan"))
        self.buffers = weakref.ref(received), weakref.ref(sent)
        self.collective = collective

    def wait(self) -> None:
        received, sent = (buffer() for buffer in self.buffers)
        assert received is not None, "the buffer that receives was given away"
        assert sent is not None, "the buffer that is sent was given away"
        self.collective(received, sent)


def late(
    received: Tensor,
    sent: Tensor,
    receive: list[int] | None = None,
    send: list[int] | None = None,
    *,
    group: dist.ProcessGroup,
    async_op: bool = False,
) -> LateWork | None:
    def collective(received: Tensor, sent: Tensor) -> None:
        all_to_all_single(received, sent, receive, send, group=group)

    if async_op:
        return LateWork(received, sent, collective)
    collective(received, sent)
    return None


def arrays(
    layer: MoeLayer, tokens: int, dtype: torch.dtype, recompute: bool = False
) -> list[NDArray[Any]]:
    results = trained(layer, tokens, dtype, recompute)
    return [result.detach().float().numpy().copy() for result in results]


def three_ways(rank: int, tokens: list[int], dtype: torch.dtype, skewed: bool) -> list[Any]:
    """At once, overlapped, and overlapped by collectives that work as late as they may."""

    def run(dispatch: Callable[[Any], Any] = lambda d: d) -> list[NDArray[Any]]:
        layer = layer_of(rank, len(tokens), dtype)
        layer.dispatch = dispatch(layer.dispatch)
        router: Any = layer.router
        if skewed:  # everything goes to experts 0 and 1: the last ranks get no rows
            router.expert_bias += torch.tensor([9.0, 9.0, 0.0, 0.0])
        return arrays(layer, tokens[rank], dtype)

    results = [run(at_once), run()]
    dist.all_to_all_single = late  # type: ignore[assignment]
    # Anomaly detection reads every gradient: a buffer that is being written would show as NaN.
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        results.append(run())
    return results


def assert_bitwise_equal(wanted: list[NDArray[Any]], others: list[list[NDArray[Any]]]) -> None:
    assert all(np.isfinite(value).all() for value in wanted)
    for found in others:
        for value, right in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(value, right)


@pytest.mark.parametrize(
    ("tokens", "dtype", "skewed"),
    [
        ([7, 5], torch.float32, False),
        ([6, 9], torch.bfloat16, False),
        ([3, 2, 8, 1], torch.float64, False),
        ([4, 5, 6, 7], torch.float32, True),
    ],
)
def test_results_are_bitwise_those_without_overlap(
    tokens: list[int], dtype: torch.dtype, skewed: bool
) -> None:
    for wanted, *others in run_distributed(three_ways, len(tokens), tokens, dtype, skewed):
        assert_bitwise_equal(wanted, others)


def kept_and_recomputed(rank: int) -> list[list[NDArray[Any]]]:
    return [arrays(layer_of(rank, 2), 6, torch.float64, recompute) for recompute in (False, True)]


def test_a_recomputed_layer_is_bitwise_the_same() -> None:
    """Its exchanges are started and waited for once more, in the backward pass."""
    for wanted, *others in run_distributed(kept_and_recomputed, 2):
        assert_bitwise_equal(wanted, others)
