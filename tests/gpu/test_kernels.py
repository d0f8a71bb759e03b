"""The kernels on the device: the tests of the host, with tensors that lie there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.backend.kernels import KERNELS, choose
from parallel.backend.select import select_backend
from parallel.cross_entropy import summed_cross_entropy
from parallel.flash_attention import computes
from tests.gpu.worker import Worker
from tests.unit.parallel import test_cross_entropy as cross_entropy_tests
from tests.unit.parallel import test_kernels as kernel_tests
from tests.unit.train.model.tiny import relative_error
from train.model.attention.core import attend

# megatron-core warns while it is imported.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]

DTYPES = kernel_tests.BOUNDS


def on_device(backend: str, test: str, *args: Any) -> None:
    """A test of the host's with the device as its last argument."""
    chosen = select_backend(backend)
    chosen.set_device(chosen.device(0))
    getattr(kernel_tests, test)(*args, chosen.device_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS["kernels.grouped_linear"])
def test_grouped_products(device: Worker, name: str, dtype: torch.dtype) -> None:
    device.call(on_device, "test_grouped_products", name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS["kernels.permute"])
def test_rows_sorted_and_summed(device: Worker, name: str, dtype: torch.dtype) -> None:
    device.call(on_device, "test_rows_sorted_and_summed", name, dtype)


@pytest.mark.parametrize("name", KERNELS["kernels.permute"])
def test_tokens_with_different_numbers_of_experts(device: Worker, name: str) -> None:
    device.call(on_device, "test_tokens_with_different_numbers_of_experts", name)


def test_no_tokens_at_all(device: Worker) -> None:
    device.call(on_device, "test_no_tokens_at_all", 1)


def many_rows(backend: str) -> tuple[float, float, float]:
    """Both products of a layer with many experts of unequal load, in bf16, against fp32."""
    torch.manual_seed(0)
    where = select_backend(backend).device_type
    counts = torch.randint(0, 90, (64,))
    counts[5] = counts[63] = 0
    rows = torch.randn(int(counts.sum()), 256).to(where, torch.bfloat16).requires_grad_()
    weights = torch.randn(64, 384, 256).to(where, torch.bfloat16).requires_grad_()
    direction = torch.randn(len(rows), 384).to(where)
    kernel, loop = (choose("kernels.grouped_linear", n, where) for n in ("grouped_mm", "loop"))
    results = []
    for product, leaves in ((kernel, (rows, weights)), (loop, (rows.float(), weights.float()))):
        out = product(*leaves, counts.to(where))
        results.append([out, *torch.autograd.grad(out, leaves, direction.to(out.dtype))])
    errors = [relative_error(found.float(), wanted) for found, wanted in zip(*results, strict=True)]
    return errors[0], errors[1], errors[2]


def test_many_experts_in_bf16(device: Worker) -> None:
    for error in device.call(many_rows):
        assert error <= 4e-3  # one rounding of the result, one of the gradient that comes in


def attention(backend: str, qk_dim: int, v_dim: int) -> tuple[list[float], bool]:
    """Errors of the kernel in bf16, result and gradients, against the reference in fp32; and whether
    it computes the same bits again."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    where = select_backend(backend).device_type
    documents = torch.randint(0, 40, (2, 700)).sort(dim=1).values.to(where)
    documents[1] = 5  # one document
    shapes = [(2, 700, 4, width) for width in (qk_dim, qk_dim, v_dim, v_dim)]
    *leaves, direction = (torch.randn(shape).to(where, torch.bfloat16) for shape in shapes)
    assert computes(torch.bfloat16, qk_dim, leaves[2].shape)
    kernel = choose("kernels.attention", "flash", where)

    def heads_first(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, ids, scale).transpose(1, 2)

    results = []
    for function, dtype in ((kernel, torch.bfloat16),) * 2 + ((heads_first, torch.float32),):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        q, k, v = inputs
        out = function(q, k, v, documents, qk_dim**-0.5)
        results.append([out, *torch.autograd.grad(out, inputs, direction.to(dtype))])
    once, again, wanted = results
    same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    return [relative_error(a.float(), b) for a, b in zip(once, wanted, strict=True)], same


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(192, 128), (48, 32), (20, 36)])
def test_flash_attention(device: Worker, qk_dim: int, v_dim: int) -> None:
    errors, same = device.call(attention, qk_dim, v_dim)
    assert max(errors) <= 1e-2, errors  # bf16: 2^-8 a rounding
    assert same


def cross_entropy(backend: str, dtype: torch.dtype, bound: float) -> None:
    where = select_backend(backend).device_type
    with pytest.MonkeyPatch.context() as patch:
        cross_entropy_tests.test_loss_and_gradient_equal_torch(patch, dtype, bound, where)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)]
)
def test_cross_entropy(device: Worker, dtype: torch.dtype, bound: float) -> None:
    device.call(cross_entropy, dtype, bound)


def megatron_cross_entropy(backend: str, name: str, dtype: torch.dtype) -> tuple[float, float]:
    torch.manual_seed(0)
    where = select_backend(backend).device_type
    logits = (3 * torch.randn(2, 300, 512)).to(where, dtype).requires_grad_()
    labels = torch.randint(0, 512, (2, 300)).to(where)
    labels[0, 30:60] = -100
    losses = [
        function(logits, labels)
        for function in (choose("kernels.cross_entropy", name, where), summed_cross_entropy)
    ]
    grads = [torch.autograd.grad(loss / 7, logits)[0].double() for loss in losses]
    return relative_error(*losses), relative_error(*grads)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("megatron", torch.float32, 1e-6),
        ("megatron", torch.bfloat16, 3e-3),
    ],
)
def test_megatrons_cross_entropy(
    device: Worker, name: str, dtype: torch.dtype, bound: float
) -> None:
    loss, gradient = device.call(megatron_cross_entropy, name, dtype)
    assert loss <= 1e-6
    assert gradient <= bound
