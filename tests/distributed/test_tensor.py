"""Embedding, dense feed-forward and loss over pieces of their weights, against the whole ones."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel import cross_entropy
from parallel.config import ParallelConfig
from parallel.cross_entropy import summed_cross_entropy
from parallel.layout import ParallelLayout
from parallel.local_tensors import cut_parameters
from parallel.mesh import build_mesh
from parallel.sequence import SequenceSplit
from parallel.tensor import VocabularyLookup
from tests.harness import run_distributed
from train.model.embedding import OutputHead, TokenEmbedding
from train.model.ffn import FeedForward

VOCAB, HIDDEN, WIDTH, BATCH, SEQUENCE, RANKS = 24, 8, 12, 2, 8, 4


def several_chunks(logits: Tensor) -> Any:
    return (slice(start, start + 5) for start in range(0, len(logits), 5))


def logits_and_labels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """No label is in the last rank's piece of the vocabulary, and some are invalid."""
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(BATCH, SEQUENCE, VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCAB - VOCAB // RANKS, (BATCH, SEQUENCE), generator=generator)
    labels[0, 2:5] = -100
    return logits.requires_grad_(), labels


def loss_of_a_piece(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    cross_entropy._chunks = several_chunks
    logits, labels = logits_and_labels(dtype)
    mine = logits.detach().chunk(RANKS, dim=-1)[rank].clone().requires_grad_()
    group = dist.group.WORLD
    share = summed_cross_entropy(mine, labels, group)
    [gradient] = torch.autograd.grad(share / 7, mine)
    assert gradient.dtype == dtype
    return {
        "share": share.item(),
        "dtype": share.dtype,
        "gradient": gradient.double().numpy().copy(),
    }


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_shares_of_the_loss_add_up_and_every_gradient_is_that_of_the_sum(
    dtype: torch.dtype, bound: float
) -> None:
    found = run_distributed(loss_of_a_piece, RANKS, dtype)
    logits, labels = logits_and_labels(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = F.cross_entropy(logits.to(wide).flatten(0, 1), labels.flatten(), reduction="sum")
    assert {answer["dtype"] for answer in found} == {wide}
    assert found[-1]["share"] == 0
    assert sum(answer["share"] for answer in found) == pytest.approx(wanted.item(), rel=bound)
    [gradient] = torch.autograd.grad(wanted / 7, logits)
    mine = np.concatenate([answer["gradient"] for answer in found], axis=-1)
    assert np.abs(mine - gradient.double().numpy()).max() <= bound / 7
    assert not mine[0, 2:5].any()


class Ends(nn.Module):
    """Embedding, a dense feed-forward network and the head, as blocks call them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(VOCAB, HIDDEN)
        self.ffn = FeedForward(HIDDEN, WIDTH, limit=1.0)
        self.head = OutputHead(HIDDEN, VOCAB)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor, labels: Tensor, split: SequenceSplit) -> Tensor:
        part = split.of(ids.shape[1])
        x = part.scatter_queries(self.embedding(part.take_queries(ids)))
        assert x.shape[1] == part.num_tokens
        x = x + part.scatter_queries(self.ffn(part.gather_queries(x)))
        logits = self.head(part.gather_queries(x))
        return summed_cross_entropy(logits, part.take_queries(labels), split.tensor)


def ids_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def ends_of_a_rank(rank: int) -> tuple[float, dict[str, NDArray[np.float64]]]:
    meshes = build_mesh(ParallelLayout.from_config(ParallelConfig(tensor_parallel_size=2)), "cpu")
    model = Ends().double()
    for column in (model.embedding, model.ffn.gate, model.ffn.up, model.head):
        cut_parameters(column, meshes.tp, 0)
    cut_parameters(model.ffn.down, meshes.tp, 1)
    model.embedding.lookup = VocabularyLookup(rank)
    group = meshes.tp.get_group()
    loss = model(*ids_and_labels(), SequenceSplit(tensor=group, both=group))
    torch.autograd.backward(loss)
    whole = {}
    for name, parameter in model.named_parameters():
        # At rest it is a DTensor again.
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() * 2 == parameter.numel()
        assert isinstance(parameter.grad, DTensor)
        whole[name] = parameter.grad.full_tensor().numpy().copy()
    return loss.item(), whole


def test_embedding_ffn_head_and_loss_equal_the_whole_ones() -> None:
    found = run_distributed(ends_of_a_rank, 2)
    model = Ends().double()
    loss = model(*ids_and_labels(), SequenceSplit())
    torch.autograd.backward(loss)
    assert sum(share for share, _ in found) == pytest.approx(loss.item(), rel=1e-14)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        wanted = parameter.grad.numpy()
        np.testing.assert_allclose(found[0][1][name], wanted, rtol=1e-12, atol=1e-13)
