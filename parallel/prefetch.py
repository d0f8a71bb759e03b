"""When parameters are gathered: before they are needed; called by `parallel.apply`.

Gradients need no such help: FSDP2 starts to sum those of a unit as soon as the backward pass leaves
it, and waits for the sums at the end.
"""

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule


def prefetch_parameters(
    root: nn.Module, blocks: Sequence[nn.Module], experts: Sequence[nn.Module]
) -> None:
    """Let FSDP2 gather what runs next while something else is computed. Results stay bitwise.

    By itself FSDP2 starts a gather when the host reaches the unit, and relies on the host being far
    ahead of the device. Here it is not: every mixture-of-experts layer waits for the counts of its
    rows. So a block starts, before it computes, the gathers of its experts, of the next block and
    of the small units inside that; in the backward pass those of its experts and of the block
    before it. That holds one block without its experts more in memory. Where collectives block the
    host, as those of gloo do, only their order changes.

    Experts start no gather themselves: where a block is computed again in the backward pass, they
    would gather the next one again, for nothing.

    Args:
        root: sharded, as is every unit inside it.
        blocks: units in the order of the forward pass. Each runs in every forward pass: what is
            gathered but not used would be used, stale, in the next one.
        experts: units inside blocks.
    """
    before, its_experts = root, list[FSDPModule]()
    for block in blocks:
        inside = [m for m in block.modules() if isinstance(m, FSDPModule) and m not in blocks]
        _unit(before).set_modules_to_forward_prefetch(
            [*its_experts, _unit(block), *(unit for unit in inside if unit not in experts)]
        )
        its_experts = [unit for unit in inside if unit in experts]
        done = [_unit(before)] if before is not root else []
        _unit(block).set_modules_to_backward_prefetch([*its_experts, *done])
        before = block
    _unit(before).set_modules_to_forward_prefetch(its_experts)


def _unit(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "fully_shard comes first"
    return module
