"""The runs of the published models: tokens, learning rates and attention over the tokens."""

from dataclasses import dataclass

import pytest

from launch.compose import compose
from train.config import RunConfig
from train.optim.schedule import last_step_before_decay, learning_rate
from train.stages import Phase, phases


@dataclass(frozen=True, kw_only=True)
class Published:
    """Trillions of tokens; each is met within the tokens of a few hundred steps."""

    source: str
    tokens: float
    decay: tuple[float, float] | None = None
    """Where the learning rate begins to fall and where it has fallen."""
    rates: tuple[float, float] | None = None
    """At the peak and at the end."""


PUBLISHED = {
    "v3_671b": Published(
        source="arXiv 2412.19437, section 4.2",
        tokens=14.8,
        decay=(10, 14.3),
        rates=(2.2e-4, 2.2e-5),
    ),
    "v32_671b": Published(source="DeepSeek_V3_2.pdf, section 2.1", tokens=0.9437 + 0.0021),
    "mhc_3b": Published(source="arXiv 2512.24880, table 5", tokens=0.0393, rates=(8.6e-4, 8.6e-5)),
    "mhc_9b": Published(source="arXiv 2512.24880, table 5", tokens=0.105, rates=(5.9e-4, 5.9e-5)),
    "mhc_27b": Published(source="arXiv 2512.24880, table 5", tokens=0.262, rates=(4e-4, 4e-5)),
    "engram_27b": Published(source="arXiv 2601.07372, app. A", tokens=0.262, rates=(4e-4, 4e-5)),
    "v4_flash": Published(
        source="arXiv 2606.19348, section 4.2", tokens=32, rates=(2.7e-4, 2.7e-5)
    ),
    "v4_pro": Published(source="arXiv 2606.19348, section 4.2", tokens=33, rates=(2e-4, 2e-5)),
    "v41_flash": Published(
        source="DeepSeek-V4.1-Flash report", tokens=45, decay=(28, 40), rates=(2.6e-4, 2.6e-5)
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_and_rates_are_as_published(name: str) -> None:
    config, published = compose(name).config, PUBLISHED[name]
    optim, steps = config.optim, config.train.steps
    assert trillions(config, steps) == pytest.approx(published.tokens, rel=2e-3), published.source
    if published.decay:
        first, last = last_step_before_decay(optim, steps), round(optim.decay_end * steps)
        found = trillions(config, first), trillions(config, last)
        assert found == pytest.approx(published.decay, rel=2e-3), published.source
    if published.rates:
        peak, end = (
            learning_rate(optim, optim.warmup_steps, steps),
            learning_rate(optim, steps, steps),
        )
        assert (peak, end) == pytest.approx(published.rates, rel=1e-3), published.source


@pytest.mark.parametrize(("name", "batch_tokens"), [("v4_flash", 75.5e6), ("v4_pro", 94.4e6)])
def test_v4_goes_from_dense_attention_to_sparse_on_longer_sequences(
    name: str, batch_tokens: float
) -> None:
    config = compose(name).config
    run = phases(config)
    assert sorted({phase.sequence_length for phase in run}) == [2**12, 2**14, 2**16, 2**20]
    assert lengths(run) == sorted(lengths(run))
    assert [phase.tokens_per_step for phase in run] == pytest.approx(
        [batch_tokens] * len(run), rel=2e-3
    )
    dense = [phase for phase in run if phase.indexer_stage == "dense"]
    assert trillions(config, dense[-1].last_step) == pytest.approx(1, rel=5e-3)
    assert {phase.sequence_length for phase in run if phase.indexer_stage == "sparse"} == {
        2**16,
        2**20,
    }


def trillions(config: RunConfig, step: int) -> float:
    """Tokens of the steps up to this one."""
    steps = ((min(step, phase.last_step) - phase.first_step + 1, phase) for phase in phases(config))
    return sum(max(0, number) * phase.tokens_per_step for number, phase in steps) / 1e12


def lengths(run: list[Phase]) -> list[int]:
    """Sequence lengths in the order of the run."""
    return [phase.sequence_length for phase in run]
