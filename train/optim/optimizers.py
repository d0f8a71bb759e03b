"""Several optimizers as one: what `train.step` steps and `train.checkpoint` saves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Optimizers:
    """Optimizers of different parameters of one model.

    Their states exist from the start, as DTensors sharded like the parameters (a step counter is a
    plain tensor), so that a checkpoint is read into them in place, on any layout.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)

    def step(self) -> None:
        """Update the parameters that have gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every parameter group its multiple of the schedule's rate."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["learning_rate_multiplier"]

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state that belongs to a parameter, by key."""
        [state] = [o.state[parameter] for o in self._optimizers if parameter in o.state]
        return dict(state)
