"""How far lazy Adam goes from dense Adam: `python -m tests.benchmarks.of_engram.lazy_adam`.

A table learns a target for each row, from noisy gradients of the rows that a step draws. Rows are drawn
as words are, by Zipf's law, so that some are in every step and most in hardly any. Dense Adam gets the
gradient of the whole table, with zeros for rows that were not drawn. Each optimizer follows its own
table; both see the same draws and the same noise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from parallel.engram_optimizers import LazyAdam
from parallel.engram_rows import RowStore

LEARNING_RATE, BETAS, EPS = 0.01, (0.9, 0.99), 1e-8


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where both are after some steps."""

    step: int
    distance: float
    """Norm of the difference of the two tables over that of the dense one."""
    touched: float
    """Part of the rows that have been drawn so far."""
    lazy_error: float
    """Mean square distance from the targets, over rows as they are drawn, relative to the start's."""
    dense_error: float


def curve(
    *,
    rows: int = 20_000,
    width: int = 16,
    draws: int = 4096,
    at: tuple[int, ...] = (1, 3, 10, 30, 100, 300),
    exponent: float = 1.0,
    seed: int = 0,
) -> list[Point]:
    """Train both tables.

    Args:
        rows: of the table.
        width: of a row.
        draws: rows that a step reads, some of them often.
        at: steps after which they are compared; the last ends it.
        exponent: of Zipf's law.
        seed: of everything.
    """
    random = np.random.default_rng(seed)
    chances = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    chances /= chances.sum()
    target = random.standard_normal((rows, width)).astype(np.float32)
    store = RowStore(
        rows,
        width,
        LazyAdam(*BETAS, EPS),
        rank=0,
        ranks=1,
        dtype="fp32",
        storage="memory",
        seed=seed,
        huge_pages=False,
    )
    lazy = store.arrays["rows"]
    weight = nn.Parameter(torch.zeros(rows, width))
    adam = torch.optim.AdamW([weight], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    weight.grad = torch.zeros_like(weight)
    dense, gradients = weight.detach().numpy(), weight.grad.numpy()
    seen, points = np.zeros(rows, np.bool_), []
    for step in range(1, max(at) + 1):
        local, counts = np.unique(random.choice(rows, draws, p=chances), return_counts=True)
        noise = random.standard_normal((len(local), width))
        weights = counts[:, None] / draws
        noise *= np.sqrt(weights / draws)
        seen[local] = True
        mine = ((lazy[local] - target[local]) * weights + noise).astype(np.float32)
        store.update(local, mine, step=step, learning_rate=LEARNING_RATE, scale=1.0)
        gradients[:] = 0
        gradients[local] = (dense[local] - target[local]) * weights + noise
        adam.step()
        if step in at:
            points.append(
                Point(
                    step=step,
                    distance=float(np.linalg.norm(lazy - dense) / np.linalg.norm(dense)),
                    touched=float(seen.mean()),
                    lazy_error=_error(lazy, target, chances),
                    dense_error=_error(dense, target, chances),
                )
            )
    return points


def _error(
    table: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    target: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    chances: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> float:
    squares = ((table - target) ** 2).mean(axis=1)
    return float(chances @ squares / (chances @ (target**2).mean(axis=1)))


if __name__ == "__main__":
    for law in (0.0, 1.0):
        for point in curve(exponent=law):
            print(f"exponent {law}: {point}")
