"""Parameter groups of AdamW: which parameters decay, which learn faster."""

from collections.abc import Iterable

import torch
from torch import nn

from train.config import OptimConfig

ParameterGroup = dict[str, object]


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    engram_tables: set[str],
    config: OptimConfig,
) -> list[ParameterGroup]:
    """Split parameters as the papers do.

    * Engram tables: learning rate x `engram_learning_rate_multiplier`, no decay (arXiv 2601.07372,
      appendix A).
    * Weight matrices: decoupled decay.
    * Vectors and scalars (norms, biases, gates): no decay.

    Args:
        named_parameters: name and parameter, in the model's order.
        engram_tables: names of the parameters that are memory tables.
        config: rates and decay.

    Returns:
        Groups for `torch.optim.AdamW`; `learning_rate_multiplier` is read by `set_learning_rate`.
    """
    tables: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if name in engram_tables:
            tables.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups: list[ParameterGroup] = []
    for parameters, decay, multiplier in (
        (matrices, config.weight_decay, 1.0),
        (vectors, 0.0, 1.0),
        (tables, 0.0, config.engram_learning_rate_multiplier),
    ):
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "weight_decay": decay,
                    "learning_rate_multiplier": multiplier,
                }
            )
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its multiple of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_multiplier"]


def build_adamw(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `groups`; one fused kernel per tensor, states in the parameters' type."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
