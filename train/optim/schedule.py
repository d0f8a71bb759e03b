"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from train.config import OptimConfig, RunConfig

_WSD_DECAY_FRACTION = 0.2


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (1 to `total_steps`).

    Linear warm-up from 0 to the peak over `warmup_steps`, then by `config.schedule`: constant;
    cosine and wsd: constant to the start of the decay, then along a cosine or a line to
    `final_fraction`, and constant from `decay_end`; step: x0.316 at 80 % and x0.1 at 90 % of the
    run (arXiv 2512.24880, table 5).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    return config.learning_rate * _decay(config, step, total_steps)


def last_step_before_decay(config: OptimConfig, total_steps: int) -> int:
    """The last step at the peak rate; `total_steps` if it never falls."""
    if config.schedule == "constant":
        return total_steps
    if config.schedule == "step":
        return math.floor(0.8 * total_steps)
    fraction = config.decay_fraction
    if fraction is None:
        fraction = _WSD_DECAY_FRACTION if config.schedule == "wsd" else 1.0
    start = _decay_end(config, total_steps) - round(fraction * total_steps)
    return max(config.warmup_steps, start)


def mtp_loss_weight(config: RunConfig, step: int) -> float:
    """Weight of the MTP loss: its final value from the first step of the learning rate's decay."""
    final = config.model.mtp_loss_weight_final
    if final is not None and step > last_step_before_decay(config.optim, config.train.steps):
        return final
    return config.model.mtp_loss_weight


def _decay_end(config: OptimConfig, total_steps: int) -> int:
    return round(config.decay_end * total_steps)


def _decay(config: OptimConfig, step: int, total_steps: int) -> float:
    start = last_step_before_decay(config, total_steps)
    if step <= start:
        return 1.0
    if config.schedule == "step":
        return 0.316 if step / total_steps <= 0.9 else 0.1
    end = _decay_end(config, total_steps)
    left = max(0, end - step) / max(1, end - start)
    shape = 0.5 * (1.0 - math.cos(math.pi * left)) if config.schedule == "cosine" else left
    return config.final_fraction + (1.0 - config.final_fraction) * shape
