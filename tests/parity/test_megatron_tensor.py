"""Tensor parallelism and process groups against megatron-core's, on gloo."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from parallel.cross_entropy import summed_cross_entropy
from parallel.layout import ParallelLayout
from parallel.local_tensors import cut_parameters
from parallel.mesh import Meshes, build_mesh
from parallel.sequence import SequenceSplit
from parallel.tensor import VocabularyLookup
from tests.harness import run_distributed
from train.model.embedding import TokenEmbedding

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

VOCAB, HIDDEN, WIDTH, BATCH, SEQUENCE = 24, 8, 12, 2, 6


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> None:
    """Imported once, before the ranks fork: it takes seconds."""
    import_module("parallel.megatron")
    import_module("parallel.megatron_cross_entropy")


LAYOUTS = [
    ParallelLayout(data=2, tensor=2, expert=2),
    ParallelLayout(context=2, tensor=2, expert=4),
    ParallelLayout(pipeline=2, data=2),
]


def groups_of_both(rank: int, layout: ParallelLayout) -> list[tuple[str, list[int], list[int]]]:
    from megatron.core import parallel_state  # noqa: PLC0415
    from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: PLC0415

    from parallel.megatron import process_groups  # noqa: PLC0415

    ours = process_groups(build_mesh(layout, "cpu"))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
    )
    theirs = ProcessGroupCollection.use_mpu_process_groups(list(vars(ours)))

    def ranks(groups: Any, name: str) -> list[int]:
        return sorted(dist.get_process_group_ranks(getattr(groups, name)))

    return [(name, ranks(ours, name), ranks(theirs, name)) for name in vars(ours)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_our_groups_are_those_that_megatron_makes_of_the_same_sizes(layout: ParallelLayout) -> None:
    for rank, groups in enumerate(run_distributed(groups_of_both, 4, layout)):
        assert len(groups) == 12
        for name, ours, theirs in groups:
            assert rank in ours
            assert ours == theirs, name


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs_of(meshes: Meshes) -> tuple[Any, Any, Any]:
    """An embedding, a column-parallel and a row-parallel layer with the values of ours."""
    from megatron.core import ModelParallelConfig  # noqa: PLC0415
    from megatron.core.tensor_parallel import (  # noqa: PLC0415
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    from parallel.megatron import process_groups  # noqa: PLC0415

    config = ModelParallelConfig(
        tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=False
    )
    common: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_}
    common["tp_group"] = process_groups(meshes).tp
    linear = common | {"bias": False, "skip_bias_add": True}
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **common)
    column = ColumnParallelLinear(HIDDEN, WIDTH, gather_output=False, **linear)
    row = RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=True, **linear)
    rank = meshes.tp.get_local_rank()
    with torch.no_grad():
        embedding.weight.copy_(values(VOCAB, HIDDEN, seed=0).chunk(2)[rank])
        column.weight.copy_(values(WIDTH, HIDDEN, seed=1).chunk(2)[rank])
        row.weight.copy_(values(HIDDEN, WIDTH, seed=2).chunk(2, dim=1)[rank])
    return embedding, column, row


def ours_of(meshes: Meshes) -> tuple[Any, Any, Any]:
    embedding = TokenEmbedding(VOCAB, HIDDEN)
    column, row = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
    embedding.lookup = VocabularyLookup(meshes.tp.get_local_rank())
    with torch.no_grad():
        embedding.weight.copy_(values(VOCAB, HIDDEN, seed=0))
        column.weight.copy_(values(WIDTH, HIDDEN, seed=1))
        row.weight.copy_(values(HIDDEN, WIDTH, seed=2))
    for module, dim in ((embedding, 0), (column, 0), (row, 1)):
        cut_parameters(module, meshes.tp, dim)
    return embedding, column, row


def layers_of_both(rank: int) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Results at this rank's tokens, and local gradients: ours with sequence parallelism."""
    from megatron.core.tensor_parallel import (  # noqa: PLC0415
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

    meshes = build_mesh(ParallelLayout(tensor=2), "cpu")
    group = meshes.tp.get_group()
    part = SequenceSplit(tensor=group, both=group).of(SEQUENCE)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(3))
    direction = values(BATCH, SEQUENCE, HIDDEN, seed=4)

    embedding, column, row = ours_of(meshes)
    x = part.scatter_queries(embedding(part.take_queries(ids)))
    y = part.scatter_queries(row(column(part.gather_queries(x)).tanh()))
    torch.autograd.backward(y, part.take(direction))
    ours = [x, y, *(p.weight.grad.to_local() for p in (embedding, column, row))]

    embedding, column, row = theirs_of(meshes)
    x = embedding(ids)
    y = row(column(x)[0].tanh())[0]
    torch.autograd.backward(y, direction)
    theirs = [part.take(x), part.take(y), *(p.weight.grad for p in (embedding, column, row))]

    weight = column.weight.detach()
    x = x.detach().requires_grad_()
    z = reduce_from_tensor_model_parallel_region(
        copy_to_tensor_model_parallel_region(x, group) @ weight.T @ row.weight.detach().T, group
    )
    whole = values(WIDTH, HIDDEN, seed=1).T @ values(HIDDEN, WIDTH, seed=2).T
    ours += [x @ whole, direction @ whole.T]
    theirs += [z, torch.autograd.grad(z, x, direction)[0]]
    names = ("embedding", "rows", "embedding.grad", "columns.grad", "rows.grad", "copy", "reduce")
    arrays = ([t.detach().numpy().copy() for t in found] for found in (ours, theirs))
    return list(zip(names, *arrays, strict=True))


def test_embedding_and_linear_layers_equal_megatrons() -> None:
    for found in run_distributed(layers_of_both, 2):
        for name, ours, theirs in found:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def losses_of_both(rank: int, dtype: torch.dtype, cut: bool) -> list[tuple[float, Any]]:
    from parallel import megatron_cross_entropy  # noqa: PLC0415

    meshes = build_mesh(ParallelLayout(data=1 if cut else 2, tensor=2 if cut else 1), "cpu")
    group = meshes.tp.get_group() if cut else None
    logits = (5 * values(BATCH, SEQUENCE, VOCAB, seed=0)).to(dtype)
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(5))
    labels[0, :2] = -100
    found, functions = [], [summed_cross_entropy, megatron_cross_entropy.summed_cross_entropy]
    if cut and dtype == torch.bfloat16:
        torch.compiler.set_stance("force_eager")  # compiling takes a minute, and changes no number
        functions.append(megatron_cross_entropy.fused_cross_entropy)
    for function in functions:
        mine = logits.chunk(2, dim=-1)[rank] if cut else logits
        mine = mine.clone().requires_grad_()
        before = mine.detach().clone()
        share = function(mine, labels, group)
        [gradient] = torch.autograd.grad(share / 7, mine)
        assert gradient.dtype == dtype
        assert share.dtype == torch.float32
        assert torch.equal(mine, before)
        found.append((share.item(), gradient.float().numpy().copy()))
    return found


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_megatrons_cross_entropy_is_ours(dtype: torch.dtype, bound: float, cut: bool) -> None:
    for (share, gradient), *others in run_distributed(losses_of_both, 2, dtype, cut):
        assert len(others) == 1 + (cut and dtype == torch.bfloat16)
        for their_share, theirs in others:
            assert their_share == pytest.approx(share, rel=1e-6)
            assert np.abs(gradient - theirs).max() <= bound / 7


def test_megatrons_cross_entropy_refuses_what_it_cannot_do() -> None:
    from parallel import megatron_cross_entropy  # noqa: PLC0415

    logits, labels = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cross_entropy=megatron: computes in fp32"):
        megatron_cross_entropy.summed_cross_entropy(logits, labels)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"cross_entropy=megatron_fused: its gradient is bf16"):
            megatron_cross_entropy.fused_cross_entropy(logits.to(dtype), labels)
