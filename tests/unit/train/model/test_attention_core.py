import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.train.model.tiny import relative_error
from train.model.attention import core
from train.model.attention.core import attend


def inputs(seq: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, seq, width, generator=generator) for width in (12, 12, 8))
    documents = torch.zeros(2, seq, dtype=torch.int64)
    documents[0, seq // 3 :] = 1
    documents[1, 1:] = 4
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    return leaves[0], leaves[1], leaves[2], documents


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> Tensor:
    same = documents[:, :, None] == documents[:, None, :]
    seen = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale)


@pytest.mark.parametrize("seq", [1, 5, 128, 300])
def test_equals_masked_attention(seq: int) -> None:
    q, k, v, documents = inputs(seq, torch.float32)
    direction = torch.randn(2, 3, seq, 8)
    found = attend(q, k, v, documents, 0.3)
    wanted = reference(q, k, v, documents, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    found_grads = torch.autograd.grad(found, (q, k, v), direction)
    wanted_grads = torch.autograd.grad(wanted, (q, k, v), direction)
    for mine, theirs in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_up_to", [0, 7])
def test_gradient_of_several_chunks(monkeypatch: pytest.MonkeyPatch, keep_up_to: int) -> None:
    monkeypatch.setattr(core, "CHUNK_BYTES", 3 * 8)
    monkeypatch.setattr(core, "KEEP_UP_TO", keep_up_to)
    q, k, v, documents = inputs(7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, documents, 0.3), (q, k, v), fast_mode=True
    )


def test_bf16_is_the_fp32_result_rounded() -> None:
    q, k, v, documents = inputs(200, torch.bfloat16)
    found = attend(q, k, v, documents, 0.3)
    wanted = reference(q.float(), k.float(), v.float(), documents, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_bf16_gradients_of_many_chunks_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "CHUNK_BYTES", 2 * 2)
    monkeypatch.setattr(core, "KEEP_UP_TO", 0)
    q, k, v, documents = inputs(400, torch.bfloat16)
    documents.zero_()
    direction = torch.randn(2, 3, 400, 8).bfloat16()
    found = torch.autograd.grad(attend(q, k, v, documents, 0.3), (k, v), direction)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    result = reference(wide[0], wide[1], wide[2], documents, 0.3)
    wanted = torch.autograd.grad(result, wide[1:], direction.float())
    for mine, theirs in zip(found, wanted, strict=True):
        first = slice(0, 20)  # the keys that every chunk adds to
        assert relative_error(mine.float()[:, :, first], theirs[:, :, first]) < 0.01
