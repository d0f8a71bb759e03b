"""Every layout trains as one rank does: losses, gradient norms, gradients and parameters, in fp64.

fp64, because AdamW turns the rounding of a near-zero fp32 gradient into a visible step, and a
tolerance that lets this pass hides real errors.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from parallel.apply import apply_parallelism, set_gradient_sync
from parallel.config import KernelConfig, ParallelConfig
from parallel.expert import AllToAllDispatcher
from parallel.gradients import clip_by_global_norm
from parallel.grouped import loop
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from tests.distributed import toy
from tests.harness import run_distributed
from tests.unit.train.model.tiny import TINY
from train.model.transformer import Transformer


@dataclass(frozen=True)
class Case:
    data: int
    expert: int = 1
    num_experts: int = 4
    microbatches: int = 1
    reshard: bool = True
    permute: Literal["auto", "megatron"] = "auto"
    copies: int = 1
    whole_experts: bool = False

    @property
    def ranks(self) -> int:
        return self.copies * self.data

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(
            data_parallel_size=self.data,
            data_replicate_parallel_size=self.copies,
            expert_parallel_size=self.expert,
            expert_sharding="replicate" if self.whole_experts else "shard",
            reshard_after_forward=self.reshard,
            kernels=KernelConfig(permute=self.permute),
        )


# 6 experts leave uneven shards behind expert parallelism: 3 experts over 2 ranks.
CASES = [
    Case(1),
    Case(2, expert=2, reshard=False),
    Case(2, expert=2, microbatches=4),
    Case(4, expert=2, num_experts=6, microbatches=2),
    Case(2, expert=2, num_experts=6, microbatches=2, copies=2),
    Case(1, expert=2, copies=2, reshard=False),
    Case(4, expert=2, microbatches=2, whole_experts=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case(2, microbatches=2),
            Case(4, num_experts=6),
            Case(4, expert=4),
            # Ranks without an expert.
            Case(4, num_experts=2),
            Case(4, num_experts=2, whole_experts=True),
            Case(2, microbatches=2, copies=2),
            Case(1, num_experts=6, copies=3, microbatches=2),
            Case(2, expert=2, copies=4),
            Case(4, expert=8, num_experts=8, copies=2),
            Case(4, expert=2, num_experts=6, copies=2, whole_experts=True),
            Case(4, num_experts=6, reshard=False, whole_experts=True),
        )
    ),
]


def build(case: Case, dtype: torch.dtype, param_dtype: torch.dtype) -> toy.Toy:
    layout = ParallelLayout.from_config(case.config)
    with torch.device("meta"):
        model = toy.Toy(case.num_experts).to(dtype)
    apply_parallelism(
        model.parts(),
        layout,
        build_mesh(layout, "cpu"),
        case.config,
        param_dtype=param_dtype,
        reduce_dtype=dtype,
    )
    model.to_empty(device="cpu")
    toy.initialize(model)
    return model


def whole(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Gather every shard; arrays, because tensors do not outlive the rank that sends them."""
    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
    return {
        name: tensor.full_tensor().detach().numpy().copy()
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor)
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(rank: int, case: Case, dtype: torch.dtype, param_dtype: torch.dtype) -> dict[str, Any]:
    """Three steps; between them an evaluation, after which the shards must be back in place."""
    model = build(case, dtype, param_dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.LEARNING_RATE)
    trace: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "parameters": []}
    for step in range(toy.STEPS):
        ids, labels = toy.batch(step)
        valid = (labels >= 0).sum()
        parts = [
            (ids.chunk(case.ranks)[rank].chunk(case.microbatches)[i], y)
            for i, y in enumerate(labels.chunk(case.ranks)[rank].chunk(case.microbatches))
        ]
        loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))
        for index, (x, y) in enumerate(parts):
            set_gradient_sync(model, index == len(parts) - 1)
            part = toy.summed_loss(model, x, y, valid)
            torch.autograd.backward(part)
            # Nothing is summed over ranks before the last microbatch: the sum is a DTensor.
            summed = any(isinstance(grad, DTensor) for grad in gradients(model).values())
            assert summed == (index == len(parts) - 1)
            loss += part.detach()
        dist.all_reduce(loss)
        trace["losses"].append(loss.item())
        trace["gradients"].append(whole(gradients(model)))
        norm = clip_by_global_norm(
            dict(model.named_parameters()), toy.MAX_NORM, stage_size=case.ranks
        )
        trace["norms"].append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(ids)
        trace["parameters"].append(whole(dict(model.named_parameters())))
    return trace


@cache
def reference(num_experts: int) -> toy.Trace:
    return toy.reference(num_experts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_as_one_rank(case: Case) -> None:
    expected = reference(case.num_experts)
    traces = run_distributed(train, case.ranks, case, torch.float64, torch.float64)
    for trace in traces:
        assert trace["norms"] == traces[0]["norms"]
        np.testing.assert_allclose(trace["losses"], expected.losses, rtol=1e-12)
        np.testing.assert_allclose(trace["norms"], expected.norms, rtol=1e-12)
    # The bound cuts each step, else clipping would not be tested.
    assert min(expected.norms) > toy.MAX_NORM
    for kind, wanted in (("gradients", expected.gradients), ("parameters", expected.parameters)):
        for got, want in zip(traces[0][kind], wanted, strict=True):
            assert got.keys() == want.keys()
            for name, value in want.items():
                np.testing.assert_allclose(
                    got[name], value.numpy(), rtol=1e-9, atol=1e-9 * value.abs().max().item()
                )


@pytest.mark.slow
# megatron-core warns while it is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_kernels_of_the_recipe_are_used_and_train_as_one_rank() -> None:
    import parallel.megatron_rows  # noqa: F401, PLC0415 - before the fork: it takes seconds

    run_distributed(installed, 1)
    test_every_layout_trains_as_one_rank(Case(2, expert=2, permute="megatron"))


def installed(rank: int) -> None:
    config = ParallelConfig(kernels=KernelConfig(permute="megatron", grouped_linear="loop"))
    layout = ParallelLayout.from_config(config)
    with torch.device("meta"):
        model = Transformer(TINY)
    types = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    apply_parallelism(model.parts(), layout, build_mesh(layout, "cpu"), config, **types)
    assert model.moe_layers()
    for moe in model.moe_layers():
        assert isinstance(moe.dispatch, AllToAllDispatcher)
        assert moe.dispatch.permute.__module__ == "parallel.megatron_rows"
        assert moe.experts.grouped_linear is loop


def bf16_types(rank: int) -> dict[str, Any]:
    case = Case(2, expert=2)
    seen: dict[str, torch.dtype] = {}
    model = build(case, torch.float32, torch.bfloat16)
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):

            def look(module: nn.Module, args: Any, name: str = name) -> None:
                seen.update(
                    {f"{name}.{n}": p.dtype for n, p in module._parameters.items() if p is not None}
                )

            module.register_forward_pre_hook(look)
    ids, labels = (x.chunk(2)[rank] for x in toy.batch(0))
    torch.autograd.backward(toy.summed_loss(model, ids, labels, torch.tensor(20)))
    return {
        "seen": seen,
        "stored": {p.dtype for p in model.parameters()},
        "gradients": {g.dtype for g in gradients(model).values()},
    }


def test_bf16_computes_in_bf16_except_fp32_modules_and_stores_fp32() -> None:
    for types in run_distributed(bf16_types, 2):
        assert types["stored"] == types["gradients"] == {torch.float32}
        fp32 = {name for name, dtype in types["seen"].items() if dtype == torch.float32}
        assert fp32 == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("scale", "router")}
        others = {dtype for name, dtype in types["seen"].items() if name not in fp32}
        assert others == {torch.bfloat16}
        assert len(types["seen"]) == 2 + 2 * 6


@pytest.mark.parametrize("case", [Case(2, expert=2), Case(1, copies=2)], ids=str)
def test_bf16_follows_the_fp32_loss(case: Case) -> None:
    traces = [
        run_distributed(train, 2, case, torch.float32, dtype)[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    # bf16 keeps 8 bits, and the loss averages many roundings of 2^-9.
    np.testing.assert_allclose(traces[1]["losses"], traces[0]["losses"], rtol=5e-3)
    assert traces[1]["losses"] != traces[0]["losses"]


def save(rank: int, path: Path) -> dict[str, NDArray[Any]]:
    model = build(Case(4, expert=2, num_experts=6), torch.float64, torch.float64)
    state: dict[str, Tensor] = dict(model.named_parameters())
    dcp_save(dict(state), checkpoint_id=path)
    return whole(state)


def load(rank: int, path: Path, case: Case) -> dict[str, NDArray[Any]]:
    model = build(case, torch.float64, torch.float64)
    state: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in state.values():
            parameter.zero_()
    dcp_load(dict(state), checkpoint_id=path)
    return whole(state)


def test_checkpoint_moves_between_layouts(tmp_path: Path) -> None:
    saved = run_distributed(save, 4, tmp_path)[0]
    for case in (
        Case(1, num_experts=6),
        Case(2, num_experts=6),
        Case(2, 2, num_experts=6, copies=2),
    ):
        for loaded in run_distributed(load, case.ranks, tmp_path, case):
            assert loaded.keys() == saved.keys()
            for name, value in saved.items():
                np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def refuse(rank: int, config: ParallelConfig, message: str) -> None:
    layout = ParallelLayout.from_config(config)
    model = toy.Toy(4)
    with pytest.raises(ValueError, match=message):
        apply_parallelism(
            model.parts(),
            layout,
            build_mesh(layout, "cpu"),
            config,
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
        )


def test_expert_size_that_does_not_divide_the_experts_is_refused() -> None:
    config = ParallelConfig(data_parallel_size=3, expert_parallel_size=3)
    run_distributed(refuse, 3, config, r"expert_parallel_size=3: .*num_experts=4; use 1$")
