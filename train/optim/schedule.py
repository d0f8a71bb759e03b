"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (1 to `total_steps`).

    Linear warm-up from 0 to the peak over `warmup_steps`, then by `config.schedule`:
    constant; cosine to `final_fraction`; step x0.316 at 80 % and x0.1 at 90 % of the run
    (arXiv 2512.24880, table 5); wsd: constant, then linear to `final_fraction` over the last
    `decay_fraction` of the run.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    return config.learning_rate * _decay(config, step, total_steps)


def _decay(config: OptimConfig, step: int, total_steps: int) -> float:
    final = config.final_fraction
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        case "step":
            done = step / total_steps
            return 1.0 if done <= 0.8 else 0.316 if done <= 0.9 else 0.1
        case "wsd":
            decay_steps = max(1, round(config.decay_fraction * total_steps))
            left = (total_steps - step) / decay_steps
            return 1.0 if left >= 1.0 else final + (1.0 - final) * max(0.0, left)
