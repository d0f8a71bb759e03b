"""Every implementation of a kernel against the reference; which one is chosen, and refusals."""

import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from parallel import cross_entropy, grouped, rows
from parallel.backend.kernels import KERNELS, Kernels, choose, choose_kernels
from parallel.config import KernelConfig, ParallelConfig
from parallel.flash_attention import flash_attention

# megatron-core warns while it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

BOUNDS = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2e-3}


@pytest.fixture
def device() -> str:
    """Others call these tests with theirs."""
    return "cpu"


def test_the_recipe_has_the_names_of_the_table() -> None:
    names = {f"kernels.{key}": kind for key, kind in get_type_hints(KernelConfig).items()}
    names["expert_dispatcher"] = get_type_hints(ParallelConfig)["expert_dispatcher"]
    for key, implementations in KERNELS.items():
        auto = {"auto"} if key.startswith("kernels.") else set()
        assert set(get_args(names[key])) == auto | set(implementations)
    assert {key.removeprefix("kernels.") for key in KERNELS if key != "expert_dispatcher"} == {
        field.name for field in fields(KernelConfig)
    }
    assert len(fields(Kernels)) == len(KERNELS)


def test_auto_is_what_is_exact_and_runs_on_the_device() -> None:
    host, other = (choose_kernels(ParallelConfig(), device) for device in ("cpu", "npu"))
    assert host.permute is other.permute is rows.permute
    assert host.grouped_linear is grouped.grouped_mm
    assert other.grouped_linear is grouped.loop
    assert host.attention is other.attention is None
    assert choose_kernels(ParallelConfig(), "cuda").attention is flash_attention
    assert host.cross_entropy is other.cross_entropy is cross_entropy.summed_cross_entropy


def leaves_of(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts of each, and weights; expert 2 has no token."""
    torch.manual_seed(0)
    indices = (torch.rand(50, 6) + torch.tensor([0, 0, -9.0, 0, 1, 0])).topk(3).indices
    weights = torch.rand(50, 3, dtype=torch.promote_types(dtype, torch.float32))
    tokens = torch.randn(50, 16).to(device, dtype).requires_grad_()
    return tokens, indices.to(device), weights.to(device).requires_grad_()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", KERNELS["kernels.permute"])
def test_rows_sorted_and_summed(name: str, dtype: torch.dtype, device: str) -> None:
    """The bound is one rounding of the dtype, of the sum that the kernel returns.

    An accelerator's `index_add`, which megatron-core's kernel sums by, rounds after each of the three
    experts of a token.
    """
    roundings = 3 if name == "megatron" and device != "cpu" else 1
    tokens, indices, weights = leaves_of(dtype, device)
    order = rows.order_by_expert(indices, 6)
    assert order.counts.tolist()[2] == 0
    results = []
    for kernel in (rows.permute, choose("kernels.permute", name, device)):
        sorted_rows, combine = kernel(tokens, order)
        assert torch.equal(sorted_rows, tokens[order.token])
        total = combine(sorted_rows.sin(), weights)
        assert total.dtype == dtype
        grads = torch.autograd.grad(total.float().cos().sum(), (tokens, weights))
        results.append([total, *grads])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).double().norm() <= roundings * BOUNDS[
            dtype
        ] * wanted.double().norm()


@pytest.mark.parametrize("name", KERNELS["kernels.permute"])
def test_tokens_with_different_numbers_of_experts(name: str, device: str) -> None:
    """As a rank receives them that holds some of each token's experts; -1 is another rank's."""
    tokens, indices, weights = leaves_of(torch.float64, device)
    indices = torch.where(indices < 4, indices, -1)
    present = indices >= 0
    assert set(present.sum(1).tolist()) == {1, 2}
    indices[7] = -1
    present[7] = False
    order = rows.order_present_by_expert(indices, 4)
    sorted_rows, combine = choose("kernels.permute", name, device)(tokens, order)
    scale = torch.arange(1.0, 5.0, dtype=torch.float64, device=device)
    factors = scale.repeat_interleave(order.counts).unsqueeze(1)
    total = combine(sorted_rows * factors, weights[present])
    wanted = tokens * (weights * scale[indices] * present).sum(1, keepdim=True)
    torch.testing.assert_close(total, wanted)
    direction = torch.randn_like(total)
    for found, right in zip(
        torch.autograd.grad(total, (tokens, weights), direction),
        torch.autograd.grad(wanted, (tokens, weights), direction),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("multiple", [1, 32])
def test_no_tokens_at_all(multiple: int, device: str) -> None:
    tokens = torch.zeros(0, 8, device=device, requires_grad=True)
    indices = torch.zeros(0, 2, dtype=torch.int64, device=device)
    order = rows.order_present_by_expert(indices, 3, multiple=multiple)
    sorted_rows, combine = rows.permute(tokens, order)
    total = combine(sorted_rows, torch.zeros(0, device=device))
    assert total.shape == sorted_rows.shape == (0, 8)
    assert torch.autograd.grad(total.sum(), tokens)[0].shape == (0, 8)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", KERNELS["kernels.grouped_linear"])
def test_grouped_products(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(40, 16).to(device, dtype), torch.randn(5, 24, 16).to(device, dtype)]
    counts = torch.tensor([3, 0, 32, 5, 0], device=device)
    results = []
    for kernel in (grouped.loop, choose("kernels.grouped_linear", name, device)):
        made = [leaf.clone().requires_grad_() for leaf in leaves]
        out = kernel(made[0], made[1], counts)
        results.append([out, *torch.autograd.grad(out.sin().sum(), made)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype == dtype
        # fp64 is the loop itself. bf16 gradients round the gradient of sin as well.
        assert (found - wanted).double().norm() <= 3 * BOUNDS[dtype] * wanted.double().norm()


@pytest.mark.parametrize(
    ("key", "wanted", "device", "message"),
    [
        (
            "expert_dispatcher",
            "deepep",
            "cpu",
            "parallel.expert_dispatcher=deepep: runs on cuda, not on cpu; use all_to_all",
        ),
        (
            "kernels.grouped_linear",
            "grouped_mm",
            "npu",
            "parallel.kernels.grouped_linear=grouped_mm: runs on cpu and cuda, not on npu; use loop",
        ),
        (
            "kernels.permute",
            "triton",
            "cuda",
            "parallel.kernels.permute=triton: no such kernel; use reference or megatron",
        ),
    ],
)
def test_what_does_not_run_on_the_device_is_refused(
    key: str, wanted: str, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match="parallel") as refusal:
        choose(key, wanted, device)
    assert str(refusal.value) == message


def test_what_is_not_installed_is_refused_with_the_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_error: Any = None
    for key, wanted, module in (
        ("expert_dispatcher", "deepep", "deep_ep"),
        ("kernels.permute", "megatron", "megatron.core.transformer.moe"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, import_error)
            patch.delitem(sys.modules, "parallel.megatron_rows", raising=False)
            with pytest.raises(
                RuntimeError,
                match=rf"parallel.{key}={wanted}: `import parallel\..* fails: .*{module}",
            ):
                choose(key, wanted, "cuda")
