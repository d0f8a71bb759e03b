"""Ranges of single numbers of a recipe, which hold whatever the others are; for `launch.validate`. No torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from train.config import RunConfig

_MAY_BE_ZERO = {
    "model.num_dense_layers",
    "model.moe.num_shared_experts",
    "model.moe.num_hash_layers",
    "model.moe.hash_seed",
    "model.engram.seed",
    "model.engram.conv_kernel_size",
    "model.engram.pad_token_id",
    "data.faults.max_skipped_fraction",
    "data.faults.retry_seconds",
    "data.num_workers",
    "model.vision.placeholder_token_id",
    "model.mtp_depth",
    "data.prefetch_batches",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.final_fraction",
    "optim.decay_fraction",
    "optim.momentum",
    "optim.beta1",
    "optim.beta2",
    "train.seed",
    "checkpoint.keep_every_steps",
    "evaluate.every_steps",
    "evaluate.num_questions",
    "monitor.residual_every_steps",
    "monitor.expert_load_every_steps",
    "model.moe.bias_update_speed",
    "model.moe.balance_loss_weight",
    "model.mla.yarn.mscale",
    "model.mla.yarn.mscale_all_dim",
    "model.mtp_loss_weight",
    "model.mtp_loss_weight_final",
    "model.hyper_connection.gate_init",
    "model.hyper_connection.phi_init_std",
    "model.hyper_connection.residual_bias_init",
    "launch.max_restarts_without_progress",
}

_BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.momentum")
_MAY_BE_ZERO_NAMED = re.compile(
    r"data\.(sources\.[^.]+\.weight|weight_schedule\[\d+\]\.weights\..+)"
)
"""Paths of the same kind that hold a name."""
_AT_MOST_ONE = (
    "data.faults.max_skipped_fraction",
    "optim.final_fraction",
    "optim.decay_fraction",
    "optim.decay_end",
)


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Path and problem: numbers are finite and positive, or may be zero; some are fractions."""
    for path, value in _numbers(config):
        if not math.isfinite(value):
            yield path, f"{path}={value}: must be finite"
        elif path.startswith("monitor.alarms.") and path.endswith((".above", ".below")):
            continue
        elif value < 0 and _may_be_zero(path):
            yield path, f"{path}={value}: must not be negative; use {path}=0 or more"
        elif value <= 0 and not _may_be_zero(path):
            example = f"use {path}=1 or more" if isinstance(value, int) else "use more than 0"
            yield path, f"{path}={value}: must be positive; {example}"
        elif path in _BELOW_ONE and value >= 1:
            yield path, f"{path}={value}: must be below 1; for example {path}=0.9"
        elif path in _AT_MOST_ONE and value > 1:
            yield path, f"{path}={value}: is a fraction; use a value from 0 to 1"


def _may_be_zero(path: str) -> bool:
    return path in _MAY_BE_ZERO or _MAY_BE_ZERO_NAMED.fullmatch(path) is not None


def _numbers(node: object, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Path and value of every number below a dataclass or dict; lists of numbers have own rules."""
    items: list[tuple[str, object]] = []
    if is_dataclass(node):
        items = [(field.name, getattr(node, field.name)) for field in fields(node)]
    elif isinstance(node, dict):
        items = list(node.items())
    for name, value in items:
        if isinstance(value, dict) or is_dataclass(value):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from _numbers(entry, f"{prefix}{name}[{index}].")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value
