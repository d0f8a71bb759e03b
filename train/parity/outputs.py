"""The outputs of a model's modules, in the order of the forward pass; used by `train.parity.run`.

Watched is what a reader of the papers knows by name: memory, residual sites, norms, attention,
router, shared expert, mixture of experts, whole blocks, read-out, head. The embedding is seen where
it enters the first block. Not watched: the inside of attention, and what a rank of a layout has no
piece of: dense feed-forward networks (each rank has a summand), routed experts and the vision tower
(no dim of tokens). The next watched module shows their differences.
"""

from collections.abc import Callable, Collection, Iterator

from torch import Tensor, nn

from train.model.block import Block
from train.model.embedding import TokenEmbedding
from train.model.ffn import FeedForward
from train.model.moe.experts import Experts
from train.model.moe.layer import MoeLayer
from train.model.mtp import MultiTokenPrediction
from train.model.multimodal.tower import VisionTower
from train.model.streams import Streams
from train.model.tokens import Tokens
from train.model.transformer import Transformer

See = Callable[[int, str, Tensor], None]
"""(microbatch of this rank, name, output)."""


class OutputWatch:
    """Calls `see` with the outputs of chosen microbatches.

    A module's output is what leaves it after all communication. What activation recomputation
    repeats in the backward pass is not seen again.

    Args:
        model: the whole model, or the layers of a pipeline stage; already sharded.
        see: gets each output without its history.
    """

    def __init__(self, model: Transformer, see: See) -> None:
        self._see = see
        self._microbatch = -1
        self._chosen: Collection[int] = ()
        self._done: dict[str, int] | None = None
        """Modules that have run in this forward pass; None outside one that is watched."""
        self.order: dict[str, int] = {}
        """Place of every module in the latest watched forward pass, by when it was done first."""
        # Hooks of a module run in the order of their registration, so these see what the hooks of
        # parallelism have made of an output.
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave)
        if "0" in model.layers:
            model.layers["0"].register_forward_pre_hook(self._enter_block)
        watched = dict(_watched(model))
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(self._hook(name, shown=name in watched))

    def start_step(self, chosen: Collection[int]) -> None:
        """Count microbatches from 0 again, and watch these."""
        self._microbatch, self._chosen = -1, chosen

    def _enter(self, model: nn.Module, args: object) -> None:
        self._microbatch += 1
        self._done = {} if self._microbatch in self._chosen else None

    def _leave(self, model: nn.Module, args: object, output: object) -> None:
        self.order, self._done = self._done or self.order, None

    def _enter_block(self, block: nn.Module, args: tuple[Streams, Tokens]) -> None:
        if self._done is not None:
            self._see(self._microbatch, "embedding", args[0].x.detach())

    def _hook(self, name: str, *, shown: bool) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if self._done is None:
                return
            # MTP calls the head once more.
            place = f"{name} of MTP" if name in self._done else name
            for part, tensor in _tensors(place, output):
                if shown:
                    self._see(self._microbatch, part, tensor.detach())
            self._done.setdefault(name, len(self._done))

        return hook

    def place_of(self, name: str) -> int:
        """Where the owner of a parameter or buffer ran; -1: nowhere."""
        while name and name not in self.order:
            name = name.rpartition(".")[0]
        return self.order.get(name, -1)


def _watched(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    owners = Transformer | Block | MultiTokenPrediction | MoeLayer
    unseen = nn.ModuleDict | nn.ModuleList | TokenEmbedding | Experts | VisionTower
    for name, module in model.named_modules():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_part = isinstance(owner, owners) and not isinstance(module, unseen)
        is_part &= not (isinstance(owner, Block) and isinstance(module, FeedForward))
        if name and (is_part or isinstance(module, Block | MultiTokenPrediction)):
            yield name, module


def _tensors(name: str, output: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's output; those of tuples by field or place."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, tuple):
        fields = getattr(output, "_fields", range(len(output)))
        for field, item in zip(fields, output, strict=True):
            named = hasattr(item, "_fields")
            yield from _tensors(name if named else f"{name}.{field}", item)
