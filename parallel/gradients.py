"""One gradient norm over parameters on different meshes, and clipping by it; called by the step."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.collectives import sum_over


@torch.no_grad()
def clip_by_global_norm(
    parameters: Mapping[str, Tensor],
    max_norm: float,
    *,
    stage_size: int,
    sum_dtype: torch.dtype = torch.float64,
    further_square: float = 0.0,
) -> Float[Tensor, ""]:
    """Scale all gradients down, in place, so that their global L2 norm is at most `max_norm`.

        |g|^2 = sum over ranks and parameters of |g_local|^2 / (ranks that hold the same piece)

    torch's own clipping refuses parameters on different meshes. A norm that is not finite makes all
    gradients so: look at the result before the optimizer does.

    Communication: one all-reduce of two numbers over the world.

    Args:
        parameters: those of this rank by name, after backward, gradients summed over ranks.
        max_norm: bound of the norm.
        stage_size: ranks of a pipeline stage; those of other stages have other parameters.
        sum_dtype: type of the sum; fp32 where the device has no fp64.
        further_square: sum of the squares of gradients that are no parameters', and that no other
            rank counts.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        RuntimeError: some rank has a parameter that needs a gradient and got none.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    device = next(iter(parameters.values())).device
    square = torch.full((), further_square, dtype=sum_dtype, device=device)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        norm = torch.linalg.vector_norm(local, dtype=sum_dtype)
        square += norm.square() / replicas(gradient, stage_size)
    # Missing gradients travel along, so that all ranks fail together and none waits for another.
    total, num_missing = sum_over(torch.stack([square, square.new_tensor(len(missing))]))
    if num_missing.item():
        raise RuntimeError(
            f"no gradient after backward for {missing or 'parameters of other ranks'}: they did not "
            "take part in the loss"
        )
    norm = torch.sqrt(total)
    scale = clip_scale(norm, max_norm)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.dtype))
    return norm


def clip_scale(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""]:
    """What gradients of a norm are multiplied by, so that it is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def replicas(gradient: Tensor, stage_size: int) -> int:
    """Ranks of the pipeline stage that hold the same local part of a gradient."""
    pieces = 1
    if isinstance(gradient, DTensor):
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            assert not placement.is_partial(), "the gradient is not summed over ranks yet"
            if not placement.is_replicate():
                pieces *= size
    return stage_size // pieces
