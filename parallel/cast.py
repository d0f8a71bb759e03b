"""Computing in a narrower type than parameters are stored in, for engines that do not cast.

FSDP2 casts while it gathers. DeepSpeed would round the stored parameters of the whole model, those
that decide much (routers, mHC's maps) included; with this it stores and reduces in fp32, and a
parameter is cast where the model uses it. Called by `train.zero`.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def cast_on_use(root: nn.Module, kept: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Let `module.parameter` be the parameter in `dtype` for all modules under `root` but `kept`.

    `named_parameters` and the state dict still hold the parameters themselves, and gradients arrive
    in their type. What autograd would keep of a cast for the backward pass is not kept: it is cast
    again from the parameter, which whoever shards it has gathered by then.

    Args:
        root: a whole model, used by calling it.
        kept: modules whose own parameters stay as they are.
        dtype: type to compute in.
    """
    casts = _Casts(dtype)
    untouched = {id(module) for module in kept}
    for module in root.modules():
        if id(module) not in untouched and any(True for _ in module.parameters(recurse=False)):
            module.__class__ = casts.casting(type(module))
    casts.follow(root)


class _Recast(NamedTuple):
    """What stands for a saved cast, or a view of one, until the backward pass."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Casts:
    """The casts of one forward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._classes: dict[type[nn.Module], type[nn.Module]] = {}
        self._of_storage: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}

    def casting(self, kind: type[nn.Module]) -> type[nn.Module]:
        """The same class, but its parameters are cast when they are asked for."""
        if kind not in self._classes:

            def get(module: nn.Module, name: str) -> Any:  # noqa: ANN401 - as nn.Module's
                value = kind.__getattr__(module, name)
                return self._cast(value) if isinstance(value, nn.Parameter) else value

            names = {"__getattr__": get, "__module__": kind.__module__}
            self._classes[kind] = type(kind.__name__, (kind,), names)
        return self._classes[kind]

    def follow(self, root: nn.Module) -> None:
        """Save parameters in place of their casts during the forward passes of `root`."""
        hooks = saved_tensors_hooks(self._pack, self._unpack)

        def enter(module: nn.Module, args: object) -> None:
            hooks.__enter__()

        def leave(module: nn.Module, args: object, output: object) -> None:
            hooks.__exit__()
            self._of_storage.clear()

        root.register_forward_pre_hook(enter)
        root.register_forward_hook(leave, always_call=True)

    def _cast(self, parameter: nn.Parameter) -> Tensor:
        cast = parameter.to(self._dtype)
        if cast is not parameter:
            address = cast.untyped_storage().data_ptr()
            self._of_storage[address] = weakref.ref(cast), parameter
        return cast

    def _pack(self, tensor: Tensor) -> Tensor | _Recast:
        alive, parameter = self._of_storage.get(tensor.untyped_storage().data_ptr(), (None, None))
        # A cast that is gone may have left its memory to another tensor.
        if alive is None or alive() is None or parameter is None:
            return tensor
        return _Recast(parameter, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Recast) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            cast = saved.parameter.to(self._dtype)
            return cast.as_strided(saved.size, saved.stride, saved.offset)
