"""DeepSpeed's gradients in numbers that fp32 holds exactly, and what the engine does around them.

All weights, inputs and targets are small integers, so every gradient is an integer that no order of
summation rounds: on two ranks, where DeepSpeed's average is exact too, it has to be that of one rank
to the last bit. One module is used twice in a forward pass, the second time under activation
checkpointing, which has cost DeepSpeed's users silent errors.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from parallel import deepspeed_setup
from parallel.backend.cpu import CpuBackend
from parallel.config import Offload, ParallelConfig, ZeroConfig
from parallel.deepspeed_engine import ZeroEngine
from parallel.deepspeed_setup import load_deepspeed, materialise, zero_settings
from parallel.initialize import Init
from parallel.traffic import take_sent
from parallel.volume import Axis
from tests.distributed.test_traffic import Wire
from tests.harness import run_distributed

WIDTH, BATCH, MICROBATCHES = 5, 12, 2
RATES = (0.0, 2.0**-6)
"""The first step leaves the integers in place."""
STAGES = [
    ZeroConfig(stage=1),
    ZeroConfig(stage=2),
    ZeroConfig(stage=3),
    ZeroConfig(stage=2, offload_optimizer="cpu"),
    ZeroConfig(stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
]


class Shared(nn.Module):
    """`last(shared(shared(first(x))))`; the widths do not divide by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH, bias=False)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(self.first(x))
        hidden = checkpoint(self.shared, hidden, use_reentrant=False)
        result: Tensor = self.last(hidden)
        return result


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def inits() -> dict[str, Init]:
    shapes = {name: tuple(p.shape) for name, p in Shared().named_parameters()}
    return {name: Init.explicit(integers(s, i)) for i, (name, s) in enumerate(shapes.items())}


def loss(model: nn.Module, step: int, rows: slice) -> Tensor:
    x, target = integers((BATCH, 3), 10 + step)[rows], integers((BATCH, 3), 20 + step)[rows]
    summed: Tensor = (model(x) * target).sum()
    return summed


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, one of which learns four times as fast."""
    named = dict(model.named_parameters())
    fast = [named.pop("shared.weight")]
    return torch.optim.AdamW(
        [
            {"params": list(named.values()), "learning_rate_multiplier": 1.0},
            {"params": fast, "learning_rate_multiplier": 4.0, "weight_decay": 0.0},
        ],
        eps=1e-3,
        fused=True,
    )


def build(zero: ZeroConfig, max_norm: float = 1e9) -> tuple[Shared, ZeroEngine]:
    # So small a model would never be taken apart.
    deepspeed_setup._RESIDENT_ELEMENTS = 0
    config = ParallelConfig(data_parallel_size=2, data_engine="deepspeed", zero=zero)
    backend = CpuBackend()
    deepspeed = load_deepspeed(backend, config)
    settings = zero_settings(zero, max_grad_norm=max_norm, pin_memory=False)
    with torch.device("meta"):
        model = Shared()
    cpu = torch.device("cpu")
    materialise(deepspeed, model, inits(), settings, seed=0, device=cpu)
    return model, ZeroEngine(deepspeed, backend, model, adamw(model), settings)


def accumulate(model: nn.Module, engine: ZeroEngine, rank: int, ranks: int, step: int) -> None:
    """The rank's rows of a global batch."""
    size = BATCH // (ranks * MICROBATCHES)
    for index in range(MICROBATCHES):
        start = (rank * MICROBATCHES + index) * size
        part = loss(model, step, slice(start, start + size))
        engine.backward(part, last=index == MICROBATCHES - 1)


def gradients(model: nn.Module, ranks: int) -> dict[str, NDArray[Any]]:
    """What DeepSpeed has, which is an average."""
    import deepspeed  # noqa: PLC0415 - once it is loaded

    return {
        name: (deepspeed.utils.safe_get_full_grad(p) * ranks).numpy().copy()
        for name, p in model.named_parameters()
    }


def whole(state: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()
        for name, value in state.items()
    }


def train(rank: int, ranks: int) -> list[dict[str, Any]]:
    """A step for each of `RATES`, with an evaluation in between, for each of `STAGES`."""
    found = []
    for zero in STAGES:
        model, engine = build(zero)
        record: dict[str, Any] = {"gradients": [], "norms": []}
        for step, rate in enumerate(RATES):
            accumulate(model, engine, rank, ranks, step)
            record["gradients"].append(gradients(model, ranks))
            record["norms"].append(engine.clip_gradients().item())
            engine.step(rate)
            with torch.no_grad():
                record["evaluation"] = loss(model, 0, slice(None)).item()
        record["state"] = whole(engine.state())
        found.append(record)
    return found


def reference() -> dict[str, Any]:
    """Plain torch on one rank, the whole batch at once."""
    model = Shared()
    for name, parameter in model.named_parameters():
        values = inits()[name].values
        assert values is not None
        parameter.data.copy_(values)
    optimizer = adamw(model)
    named = dict(model.named_parameters())
    record: dict[str, Any] = {"gradients": [], "norms": []}
    for step, rate in enumerate(RATES):
        torch.autograd.backward(loss(model, step, slice(None)))
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        record["gradients"].append({name: grad.numpy().copy() for name, grad in grads.items()})
        record["norms"].append(
            torch.cat([grad.flatten().double() for grad in grads.values()]).norm().item()
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_multiplier"]
        optimizer.step()
        optimizer.zero_grad()
    record["evaluation"] = loss(model, 0, slice(None)).item()
    record["state"] = whole({f"model.{name}": p.detach() for name, p in named.items()})
    for name, parameter in named.items():
        kept = {f"optim.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        record["state"] |= whole(kept)
    return record


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Before ranks are forked: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("WORLD_SIZE", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, PLC0415


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_rank_shared_modules_included(ranks: int) -> None:
    compare_with_one_rank(run_distributed(train, ranks, ranks)[0], ranks)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_nothing_changes_on_nvme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that there is something to write: below 1 MB DeepSpeed stays in memory."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")) / "async_io" / "async_io.so"
    if not built.is_file():
        pytest.skip(
            "DeepSpeed's async_io is not built in TORCH_EXTENSIONS_DIR; it takes minutes: python -c "
            '"from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()"'
        )
    offload: list[tuple[Offload, Offload]] = [("nvme", "none"), ("nvme", "nvme")]
    stages = [
        ZeroConfig(offload_optimizer=o, offload_parameters=p, nvme_path=str(tmp_path))
        for o, p in offload
    ]
    monkeypatch.setitem(globals(), "WIDTH", 1024)
    monkeypatch.setitem(globals(), "STAGES", stages)
    monkeypatch.setattr(deepspeed_setup, "_SWAP_ELEMENTS", 2_000_000)
    compare_with_one_rank(run_distributed(train, 2, 2, timeout=150)[0], 2)
    assert any(path.stat().st_size >= 2**20 for path in tmp_path.rglob("*.swp"))


def compare_with_one_rank(found: list[dict[str, Any]], ranks: int) -> None:
    expected = reference()
    for zero, ours in zip(STAGES, found, strict=True):
        for mine, theirs in zip(ours["gradients"], expected["gradients"], strict=True):
            for name, gradient in theirs.items():
                # Thirds of integers are rounded before they are summed and taken three times.
                rounding = 0.0 if ranks == 2 else 1e-6 * np.abs(gradient).max()
                error = np.abs(mine[name] - gradient).max()
                assert error <= rounding, (zero, name, error)
        np.testing.assert_allclose(ours["norms"], expected["norms"], rtol=1e-6, err_msg=str(zero))
        assert ours["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5), zero
        assert ours["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            np.testing.assert_allclose(
                ours["state"][name], value, rtol=2e-6, atol=1e-6, err_msg=f"{zero} {name}"
            )


def clip(rank: int) -> dict[str, Any]:
    """A first step with a small bound of the norm; states show the clipped gradient."""
    model, engine = build(ZeroConfig(stage=2), max_norm=0.5)
    accumulate(model, engine, rank, 2, 0)
    norm = engine.clip_gradients().item()
    engine.step(0.0)
    return {"norm": norm, "state": whole(engine.state())}


def test_gradients_are_clipped_by_the_norm_that_is_reported() -> None:
    [ours, _] = run_distributed(clip, 2)
    expected = reference()
    assert ours["norm"] == pytest.approx(expected["norms"][0], rel=1e-6)
    for name, gradient in expected["gradients"][0].items():
        clipped = gradient * 0.5 / (ours["norm"] + 1e-6)
        np.testing.assert_allclose(
            ours["state"][f"optim.exp_avg.{name}"], 0.1 * clipped, rtol=1e-5, atol=0.0
        )


def carry_over(rank: int) -> list[bool]:
    """The state after two steps of stage 2 in each other engine, and the step that follows."""
    model, engine = build(ZeroConfig(stage=2))
    for step, rate in enumerate((RATES[1], RATES[1])):
        accumulate(model, engine, rank, 3, step)
        engine.clip_gradients()
        engine.step(rate)
    saved = engine.state()
    accumulate(model, engine, rank, 3, 2)
    engine.clip_gradients()
    engine.step(RATES[1])
    wanted = whole(engine.state())
    same = []
    for zero in STAGES:
        model, engine = build(zero)
        state = engine.state()
        assert state.keys() == saved.keys()
        for name, value in state.items():
            theirs = saved[name]
            local = value.to_local() if isinstance(value, DTensor) else value
            local.copy_(theirs.to_local() if isinstance(theirs, DTensor) else theirs)
        engine.load_state(state)
        pairs = zip(engine.state().values(), saved.values(), strict=True)
        same += [torch.equal(ours, theirs) for ours, theirs in pairs]
        accumulate(model, engine, rank, 3, 2)
        engine.clip_gradients()
        engine.step(RATES[1])
        for name, array in whole(engine.state()).items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    return same


@pytest.mark.slow
def test_states_move_between_stages_to_the_last_bit() -> None:
    """Three ranks: no tensor of the model divides by them."""
    for same in run_distributed(carry_over, 3):
        assert len(same) == 4 * 4 * len(STAGES)
        assert all(same)


def break_gradients(rank: int) -> tuple[list[float], list[str]]:
    """A step with nan or inf on one rank, and one that leaves parameters out."""
    norms, errors = [], []
    for index, zero in enumerate(STAGES):
        model, engine = build(zero)
        factor = (torch.nan, torch.inf)[index % 2] if rank == 1 else 1.0
        engine.backward(loss(model, 0, slice(0, 2)) * factor, last=True)
        norms.append(engine.clip_gradients().item())
        engine.backward(model.first(integers((2, 3), 0)).sum(), last=True)
        with pytest.raises(RuntimeError) as error:
            engine.clip_gradients()
        errors.append(str(error.value))
    return norms, errors


def test_what_is_wrong_with_gradients_is_seen_on_all_ranks() -> None:
    for norms, errors in run_distributed(break_gradients, 2):
        assert len(norms) == len(errors) == len(STAGES)
        assert not np.isfinite(norms).any()
        for error in errors:
            assert "['last.weight', 'shared.bias', 'shared.weight']" in error


def send(rank: int) -> list[tuple[dict[Axis, float], int]]:
    """A step of each stage: bytes by our counters, and by the operations that torch issued."""
    seen = []
    for zero in STAGES:
        model, engine = build(zero)
        take_sent()
        with Wire() as wire:
            accumulate(model, engine, rank, 3, 0)
            engine.clip_gradients()
            engine.step(RATES[1])
        seen.append((take_sent(), wire.sent.total()))
    return seen


def test_what_deepspeed_sends_is_counted() -> None:
    ranks = 3
    whole = sum(parameter.nbytes for parameter in Shared().parameters())
    for zero, *seen in zip(STAGES, *run_distributed(send, ranks), strict=True):
        sent = [sum(counted.values()) for counted, _ in seen]
        assert sent == pytest.approx([issued for _, issued in seen], abs=len(STAGES)), zero
        for counted, _ in seen:
            assert {axis for axis, num_bytes in counted.items() if num_bytes} == {"dp", "world"}
            # At least the gradients are summed and the parameters gathered.
            assert counted["dp"] >= 2 * whole * (ranks - 1) / ranks, zero
