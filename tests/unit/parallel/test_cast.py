"""Parameters in fp32, computed with in bf16: values, gradients, and what the backward pass keeps."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.cast import cast_on_use


class Pair(nn.Module):
    """Uses one weight in its own module, one through a parent, one twice, and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.other = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)).relu())
        # A view of a cast, of which autograd keeps a part.
        x = x @ self.other.weight.view(2, 4, 8).flatten(0, 1).t()
        stays: Tensor = self.norm(x.float())
        return stays


def build() -> Pair:
    torch.manual_seed(0)
    model = Pair()
    cast_on_use(model, [model.norm], torch.bfloat16)
    return model


def by_hand(model: Pair, x: Tensor) -> Tensor:
    named = {name: p if "norm" in name else p.bfloat16() for name, p in model.named_parameters()}
    x = F.linear(x, named["first.weight"], named["first.bias"])
    x = F.linear(F.linear(x, named["twice.weight"]).relu(), named["twice.weight"])
    x = x @ named["other.weight"].view(2, 4, 8).flatten(0, 1).t()
    return F.layer_norm(x.float(), (8,), named["norm.weight"], named["norm.bias"])


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_values_and_gradients_are_those_of_casts_by_hand() -> None:
    model = build()
    ours = model(inputs())
    found = torch.autograd.grad(ours.square().sum(), list(model.parameters()))
    theirs = by_hand(model, inputs())
    wanted = torch.autograd.grad(theirs.square().sum(), list(model.parameters()))
    assert torch.equal(ours, theirs)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        # A weight that is used twice is cast twice, and its gradients add up in fp32.
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-3)
    assert sum(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) == len(found) - 1


def test_stored_parameters_keep_type_and_name() -> None:
    model = build()
    assert model.first.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    assert isinstance(model.first, nn.Linear)
    assert dict(model.named_parameters()).keys() == dict(Pair().named_parameters()).keys()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        model.first.wieght  # noqa: B018


def test_no_cast_outlives_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a sharded model would be whole, in bf16, when its backward pass begins."""
    casts: list[weakref.ref[Tensor]] = []
    to = nn.Parameter.to

    def spy(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        cast = to(parameter, dtype)
        casts.append(weakref.ref(cast))
        return cast

    monkeypatch.setattr(nn.Parameter, "to", spy)
    model = build()
    loss = model(inputs()).sum()
    gc.collect()
    assert len(casts) == 5
    assert [cast() for cast in casts] == [None] * 5
    torch.autograd.backward(loss)
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_that_is_gone_in_backward_is_an_error_not_a_number() -> None:
    model = build()
    loss = model(inputs()).sum()
    model.twice.__dict__["_parameters"]["weight"].data = torch.empty(0)
    with pytest.raises(RuntimeError):
        torch.autograd.backward(loss)
