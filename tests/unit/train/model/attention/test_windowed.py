from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.train.model.tiny import packed
from train.model.attention import indexer
from train.model.attention.blocks import Blocks
from train.model.attention.indexer import best_keys
from train.model.attention.windowed import Parts, Seen, attend_gathered, attend_in_window

WINDOW, RATIO, HEADS, DIM = 5, 4, 3, 6


def inputs(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[Parts, Seen]:
    """query, kv, entries and sink; each query attends to a selection of the entries."""
    torch.manual_seed(0)
    _, positions, documents = packed(lengths)
    seq = documents.shape[1]
    shapes = [(2, seq, HEADS, DIM), (2, seq, DIM), (2, seq // RATIO, DIM), (HEADS,)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    visible = Blocks.of(positions, documents, RATIO).visibility(documents)
    hidden = visible.hidden(0, seq, seq // RATIO)
    chosen = best_keys(torch.randn(hidden.shape), hidden, min(3, seq // RATIO))
    return Parts(*leaves), Seen(WINDOW, visible, (range(seq),), chosen)


def reference(leaves: Parts, seen: Seen) -> Tensor:
    """The whole matrix at once."""
    query, kv, entries, sink = leaves
    seq, count = kv.shape[1], entries.shape[1]
    documents = seen.entries.query_documents
    place = torch.arange(seq)
    distance = place[:, None] - place
    window = (distance >= 0) & (distance < WINDOW) & (documents[:, :, None] == documents[:, None])
    visible = (documents[:, :, None] == seen.entries.key_documents[:, None]) & (
        seen.entries.first_query[:, None] <= place[:, None]
    )
    assert seen.selected is not None
    chosen = (seen.selected[..., None] == torch.arange(count)).any(2)
    keys = torch.cat([kv, entries], dim=1)
    scores = torch.einsum("bqhd,bkd->bqhk", query, keys)
    hidden = ~torch.cat([window, visible & chosen], dim=-1)
    scores = scores.masked_fill(hidden.unsqueeze(2), float("-inf"))
    scores = torch.cat([scores, sink.view(1, 1, -1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bqhk,bkd->bqhd", scores.softmax(-1)[..., :-1], keys)


Attend = Callable[[Parts, Seen], Tensor]


@pytest.mark.parametrize("attend", [attend_in_window, attend_gathered])
@pytest.mark.parametrize("lengths", [(1,), (3,), (20, 7, 1, 12), (150, 40, 110)])
def test_equals_the_masked_matrix(lengths: tuple[int, ...], attend: Attend) -> None:
    leaves, seen = inputs(lengths, torch.float32)
    found, wanted = attend(leaves, seen), reference(leaves, seen)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    direction = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, leaves, direction)
    theirs = torch.autograd.grad(wanted, leaves, direction)
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=2e-5)


def test_both_show_the_same_probabilities_of_the_entries() -> None:
    leaves, seen = inputs((20, 7, 12), torch.float64)
    assert seen.selected is not None
    masked = torch.zeros(2, 39, 39 // RATIO, dtype=torch.float64)
    gathered = torch.zeros_like(masked)

    def see_all(start: int, probabilities: Tensor, hidden: Tensor) -> None:
        assert not probabilities[hidden].any()
        rows = slice(start, start + hidden.shape[1])
        masked[:, rows, : hidden.shape[2]] = probabilities

    def see_selected(start: int, probabilities: Tensor, selected: Tensor) -> None:
        rows = slice(start, start + selected.shape[1])
        places = selected.clamp(min=0).long()
        gathered[:, rows].scatter_add_(2, places, probabilities.masked_fill(selected < 0, 0.0))

    attend_in_window(leaves, seen, see_all)
    attend_gathered(leaves, seen, see_selected)
    assert masked.any()
    torch.testing.assert_close(masked, gathered)


def test_gradient_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "CHUNK", 3)
    leaves, seen = inputs((7, 6), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: attend_in_window(Parts(*x), seen), tuple(leaves), fast_mode=True
    )


def test_bf16_is_the_fp32_result_rounded() -> None:
    leaves, seen = inputs((150, 50), torch.bfloat16)
    leaves = leaves._replace(sink=leaves.sink.float())
    found = attend_in_window(leaves, seen)
    wanted = reference(Parts(*(x.float() for x in leaves)), seen)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_tensor_grows_with_the_square_of_the_sequence() -> None:
    largest = []
    for seq in (1024, 2048):
        leaves, seen = inputs((seq,), torch.float32)
        with Largest() as mode:  # type: ignore[no-untyped-call]
            torch.autograd.grad(attend_in_window(leaves, seen).sum(), leaves)
        largest.append(mode.numbers)
    assert largest[1] <= 2.01 * largest[0]
    assert largest[1] < 2048**2
