"""When FSDP2 gathers parameters and sums gradients; that only the order depends on it."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

import parallel.apply
from tests.distributed import toy
from tests.distributed.test_apply import Case, build, train
from tests.harness import run_distributed

# The toy's block computes `dense`, after its fp32 scale, and then its experts.
FORWARD = """
gather layers.0
gather layers.0.scale, layers.0.router
gather layers.0.experts
gather layers.1
gather layers.1.scale, layers.1.router
compute layers.0.dense
compute layers.0.experts
gather layers.1.experts
compute layers.1.dense
compute layers.1.experts
"""
BACKWARD = """
gather layers.1
gather layers.1.experts
gather layers.0
gradient layers.1.experts
sum layers.1.experts
gradient layers.1.dense
sum layers.1.scale, layers.1.router
sum layers.1
gather layers.0.experts
gradient layers.0.experts
sum layers.0.experts
gradient layers.0.dense
sum layers.0.scale, layers.0.router
sum layers.0
"""
WORDS = {"FSDP::all_gather": "gather", "FSDP::post_backward_reduce": "sum"}


def order(rank: int, recompute: bool) -> str:
    """What starts when in a training step."""
    model = build(Case(2), torch.float32, torch.bfloat16)
    for block in model.blocks() if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]

    def mark(module: nn.Module, name: str) -> None:
        def mark_it(module: nn.Module, *args: Any, word: str) -> None:
            with record_function(f"{word} ({name})"):
                pass

        module.register_forward_pre_hook(lambda *args: mark_it(*args, word="compute"))
        module.register_full_backward_pre_hook(lambda *args: mark_it(*args, word="gradient"))

    for name, module in model.named_modules():
        if name.endswith((".dense", ".experts")):
            mark(module, name)
    ids, labels = (part.chunk(2)[rank] for part in toy.batch(0))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.autograd.backward(toy.summed_loss(model, ids, labels, torch.tensor(20)))
    lines = []
    for event in sorted(recorded.events() or [], key=lambda event: event.time_range.start):
        word, bracket, units = event.name.partition(" (")
        if bracket and WORDS.get(word, word) in ("gather", "compute", "gradient", "sum"):
            lines.append(f"{WORDS.get(word, word)} {units.removesuffix(')')}\n")
    return "".join(lines)


@pytest.mark.parametrize("recompute", [False, True])
def test_gathers_start_before_and_sums_right_after_what_is_computed(recompute: bool) -> None:
    """The next block is gathered before this one is computed, its experts before the tokens leave;
    the gradients of a unit are summed before those of the unit before it are computed. What is
    computed again in the backward pass gathers nothing but what that pass needs anyway.
    """
    wanted = FORWARD.lstrip() + BACKWARD.lstrip()
    if recompute:
        for layer in ("layers.1", "layers.0"):
            gradient = f"gradient {layer}.experts\n"
            again = f"compute {layer}.dense\ncompute {layer}.experts\n"
            wanted = wanted.replace(gradient, again + gradient)
    assert run_distributed(order, 2, recompute) == [wanted, wanted]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(2, expert=2, microbatches=2), torch.bfloat16),
        (Case(2, num_experts=6, reshard=False), torch.float64),
    ],
    ids=str,
)
def test_training_is_bitwise_that_without_prefetch(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations between the steps included: they gather, too, and must leave nothing behind."""
    stored = torch.promote_types(dtype, torch.float32)
    ahead = run_distributed(train, case.data, case, stored, dtype)
    monkeypatch.setattr(parallel.apply, "prefetch_parameters", lambda *args: None)
    alone = run_distributed(train, case.data, case, stored, dtype)
    for one, other in zip(ahead, alone, strict=True):
        assert (one["losses"], one["norms"]) == (other["losses"], other["norms"])
        for kind in ("gradients", "parameters"):
            for found, wanted in zip(one[kind], other[kind], strict=True):
                for name, value in wanted.items():
                    np.testing.assert_array_equal(found[name], value, err_msg=name)
