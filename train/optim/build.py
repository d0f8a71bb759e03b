"""Which optimizer updates which parameter; called by `train.build` on a sharded model."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from train.config import OptimConfig
from train.model.roles import Role
from train.optim.muon import Muon
from train.optim.optimizers import Optimizers
from train.optim.sinkhorn_momentum import SinkhornMomentum

ParameterGroup = dict[str, object]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    config: OptimConfig,
    *,
    iteration_dtype: torch.dtype,
    stage: dist.ProcessGroup | None = None,
) -> Optimizers:
    """Share the parameters out as the papers do.

    * Weight matrices: `optim.optimizer`. Muon takes all of them, routers and mHC's phi included:
      the report of V4 (arXiv 2606.19348, section 2.4) lists what is not on Muon, and they are not
      in the list.
    * Tables (embedding, head, Engram) named in `optim.tables`: `optim.table_optimizer`.
    * All else: AdamW. Weight matrices, embedding and head decay; Engram tables, norms, biases,
      gates and convolution taps do not.
    * Engram tables learn `optim.engram_learning_rate_multiplier` times as fast (arXiv 2601.07372,
      appendix A).

    Args:
        parameters: of this rank, by name, on their device and sharded.
        roles: of `train.model.roles`.
        config: choices, rates and decay.
        iteration_dtype: type of Muon's Newton-Schulz iteration.
        stage: the ranks that hold these parameters, copies included; None without DTensors.
    """
    muon: list[str] = []
    tables: list[str] = []
    others: list[str] = []
    for name, role in roles.items():
        if role.kind == "matrix" and config.optimizer == "muon":
            muon.append(name)
        elif role.kind in config.tables and config.table_optimizer == "sinkhorn":
            tables.append(name)
        else:
            others.append(name)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(
            Muon(
                [parameters[name] for name in muon],
                [roles[name].rows for name in muon],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                update_rms=config.update_rms,
                dtype=iteration_dtype,
                stage=stage,
            )
        )
    if tables:
        optimizers.append(
            SinkhornMomentum(
                _groups(tables, parameters, roles, config, weight_decay=0.0),
                lr=config.learning_rate,
                momentum=config.momentum,
                update_rms=config.update_rms,
                stage=stage,
            )
        )
    if others:
        optimizers.append(_with_states(adamw(others, parameters, roles, config)))
    return Optimizers(optimizers)


def _groups(
    names: list[str],
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    config: OptimConfig,
    *,
    weight_decay: float,
) -> list[ParameterGroup]:
    """Parameters of one decay and one multiple of the learning rate together."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        kind = roles[name].kind
        decay = 0.0 if kind in ("vector", "engram") else weight_decay
        multiplier = config.engram_learning_rate_multiplier if kind == "engram" else 1.0
        groups.setdefault((decay, multiplier), []).append(parameters[name])
    return [
        {"params": members, "weight_decay": decay, "learning_rate_multiplier": multiplier}
        for (decay, multiplier), members in groups.items()
    ]


def adamw(
    names: list[str],
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    config: OptimConfig,
) -> torch.optim.AdamW:
    """AdamW for some parameters, without states, with one fused kernel per tensor."""
    groups = _groups(names, parameters, roles, config, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _with_states(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """What the first step would make, in the parameters' type; a checkpoint is loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
