"""Parameters of which a rank stores a part: DTensors at rest, plain local tensors while computing.

`tensor` and `apply` cut weights with this. A checkpoint sees DTensors and reshards them by itself;
model code sees ordinary tensors and takes sizes from their shapes.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.torch_compat import local_tensor


def cut_parameters(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Keep this rank's piece of the parameters that `module` holds itself, and compute on it.

    Args:
        module: uses its parameters in its forward pass only. They are on the meta device, or equal on
            all ranks.
        mesh: one-dimensional; each rank of it keeps an equal piece.
        dim: tensor dim that is cut.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        local = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
        replacement = nn.Parameter(local, requires_grad=parameter.requires_grad)
        module.register_parameter(name, replacement)
    _compute_on_local_tensors(module)


def _compute_on_local_tensors(module: nn.Module) -> None:
    """During `module.forward`, let `self.<parameter>` be the local tensor of a DTensor.

    `nn.Module` looks a name up among parameters only when the instance has no attribute of that
    name; FSDP2 exchanges the registered parameters and does not notice.
    """

    def show(module: nn.Module, args: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                module.__dict__[name] = local_tensor(parameter)

    def hide(module: nn.Module, args: object, output: object) -> None:
        for name, _ in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)
