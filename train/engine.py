"""What the step asks of the data engine: whoever shards the model over ranks and updates it.

`FullyShardedEngine` here is FSDP2 with our optimizers; `parallel.deepspeed_engine` has DeepSpeed's
ZeRO. `train.build` chooses.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from parallel.apply import set_gradient_sync
from parallel.gradients import clip_by_global_norm
from train.optim.optimizers import Optimizers
from train.rank_model import RankModel


@runtime_checkable
class DataEngine(Protocol):
    """Sums gradients over ranks, updates parameters, and knows the state of both."""

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Add the gradient of a microbatch.

        Args:
            loss: of the microbatch, already a part of the global batch's mean.
            last: whether no other microbatch of this step follows.
        """

    def clip_gradients(self, further_square: float = 0.0) -> Float[Tensor, ""]:
        """Bound the global L2 norm of the gradients of a whole step by `optim.max_grad_norm`.

        Args:
            further_square: sum of the squares of gradients outside the model that are clipped with
                it, those that this rank counts.

        Returns:
            The norm before clipping, the same on every rank.

        Raises:
            RuntimeError: some rank has a parameter that needs a gradient and got none.
        """

    def step(self, learning_rate: float) -> None:
        """Update the parameters by the clipped gradients, and forget these."""

    def state(self, *, only_weights: bool = False) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank: `model.<name>` and `optim.<key>.<name>`."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors that `state` returned, after a checkpoint was read into them."""


class FullyShardedEngine:
    """FSDP2, our norm over all meshes, and our optimizers.

    Args:
        model: its stages are sharded by `parallel.apply`.
        optimizers: of its parameters.
        max_grad_norm: bound of the global gradient norm.
        stage_size: ranks of a pipeline stage.
        sum_dtype: type of the norm's sum.
    """

    def __init__(
        self,
        model: RankModel,
        optimizers: Optimizers,
        *,
        max_grad_norm: float,
        stage_size: int,
        sum_dtype: torch.dtype,
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._max_grad_norm, self._stage_size = max_grad_norm, stage_size
        self._sum_dtype = sum_dtype

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Add the gradient of a microbatch; the last one's pass sums all over ranks.

        Not with pipeline parallelism, whose schedules run the backward passes.
        """
        [model] = self._model.stages
        set_gradient_sync(model, last)
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_gradients(self, further_square: float = 0.0) -> Float[Tensor, ""]:
        """Clip in place; see `clip_by_global_norm`."""
        return clip_by_global_norm(
            dict(self._model.named_parameters()),
            self._max_grad_norm,
            stage_size=self._stage_size,
            sum_dtype=self._sum_dtype,
            further_square=further_square,
        )

    def step(self, learning_rate: float) -> None:
        """Update every parameter by its optimizer."""
        self._optimizers.set_learning_rate(learning_rate)
        self._optimizers.step()
        self._optimizers.zero_grad()

    def state(self, *, only_weights: bool = False) -> dict[str, Tensor]:
        """The live tensors: what is read into them is in place."""
        named = dict(self._model.named_parameters())
        found: dict[str, Tensor] = {f"model.{name}": value for name, value in named.items()}
        if not only_weights:
            for name, parameter in named.items():
                for key, value in self._optimizers.state_of(parameter).items():
                    found[f"optim.{key}.{name}"] = value
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to do: the tensors are the live ones."""
