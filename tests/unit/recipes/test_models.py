"""The model recipes against published figures, and the toy twins against their models."""

from dataclasses import dataclass
from functools import cache

import pytest

from launch.compose import compose
from train.config import RunConfig
from train.model.count import ParameterCount, count_parameters


@dataclass(frozen=True, kw_only=True)
class Published:
    """Billions of parameters, each with the relative tolerance that its rounding asks for."""

    source: str
    total: tuple[float, float]
    active: tuple[float, float] | None = None
    engram: tuple[float, float] | None = None


PUBLISHED = {
    # Their README_WEIGHTS: 671B and 36.7B; 37B in the report.
    "v3_671b": Published(
        source="arXiv 2412.19437, abstract", total=(671, 1e-3), active=(37, 0.015)
    ),
    # The report gives V3's figures; the indexer adds 0.9 B.
    "v32_671b": Published(
        source="DeepSeek_V3_2.pdf, section 2", total=(671, 2e-3), active=(37, 0.015)
    ),
    "mhc_3b": Published(
        source="arXiv 2512.24880, table 5", total=(2.97, 1.7e-3), active=(0.612, 1e-3)
    ),
    "mhc_9b": Published(
        source="arXiv 2512.24880, table 5", total=(9.18, 6e-4), active=(1.66, 3e-3)
    ),
    "mhc_27b": Published(
        source="arXiv 2512.24880, table 5", total=(27.0, 2e-3), active=(4.14, 1.3e-3)
    ),
    "moe_27b": Published(
        source="arXiv 2601.07372, appendix A", total=(26.7, 2e-3), active=(3.8, 0.01)
    ),
    # Their 5.7 B of memory are 2 layers x 16 heads x 2,262,400 rows x 80 = 5.79 B.
    "engram_27b": Published(
        source="arXiv 2601.07372, appendix A",
        total=(26.7, 2e-3),
        active=(3.8, 0.01),
        engram=(5.79, 1e-3),
    ),
    "engram_40b": Published(
        source="arXiv 2601.07372, appendix A",
        total=(39.5, 1.3e-3),
        active=(3.8, 0.01),
        engram=(18.5, 3e-3),
    ),
    "v4_flash": Published(
        source="arXiv 2606.19348, abstract", total=(284, 2e-3), active=(13, 0.025)
    ),
    # 1573 B without the MTP block, 1599 B with it.
    "v4_pro": Published(source="arXiv 2606.19348, abstract", total=(1600, 0.02), active=(49, 5e-3)),
    # Active in decoding. Compressors and indexers of every layer are 0.6 B more than the report's,
    # which are shared; the vision tower is 0.5 B of the total.
    "v41_flash": Published(
        source="DeepSeek-V4.1-Flash report",
        total=(552 + 196.6, 2.5e-3),
        active=(16, 0.05),
        engram=(196.6, 1e-3),
    ),
    "v4_1t": Published(source="as announced", total=(1000, 0.02), active=(32, 0.02)),
    "v4_lite": Published(source="the size that is asked for", total=(200, 0.02)),
}

TWINS = {
    "v3_nano": "v3_671b",
    "v32_nano": "v32_671b",
    "mhc_nano": "mhc_27b",
    "engram_nano": "engram_27b",
    "v4_flash_nano": "v4_flash",
    "v4_flash_mini": "v4_flash",
    "v41_flash_nano": "v41_flash",
    "v4_nano": "v4_1t",
    "v4_mini": "v4_1t",
}


@cache
def recipe(name: str) -> RunConfig:
    return compose(name).config


@cache
def counted(name: str) -> ParameterCount:
    return count_parameters(recipe(name).model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name: str) -> None:
    found, published = counted(name), PUBLISHED[name]
    for count, figure in (
        (found.total, published.total),
        (found.active, published.active),
        (found.engram_tables, published.engram),
    ):
        if figure is not None:
            billions, tolerance = figure
            assert count / 1e9 == pytest.approx(billions, rel=tolerance), published.source


def test_the_announced_model_has_the_announced_shape() -> None:
    model = recipe("v4_1t").model
    assert model.moe.num_experts_per_token == 16
    assert 0.20 <= counted("v4_1t").engram_share <= 0.25
    assert model.hyper_connection.num_streams == 4
    assert (model.attention, model.residual) == ("dsa", "mhc")
    assert model.vision is not None
    assert recipe("v4_1t").train.stages[-1].sequence_length == 2**20


@pytest.mark.parametrize(("twin", "name"), TWINS.items())
def test_a_twin_has_the_switches_of_its_model(twin: str, name: str) -> None:
    assert switches(recipe(twin)) == switches(recipe(name))
    assert counted(twin).total < counted(name).total / 10


def switches(config: RunConfig) -> dict[str, object]:
    """What a model is made of, without its sizes, its input and its optimizer."""
    model, engram = config.model, config.model.engram
    hybrid, v4 = model.attention == "v4_hybrid", model.compressed
    kinds = {0: "window", v4.csa_ratio: "CSA", v4.hca_ratio: "HCA"}
    return {
        "attention": model.attention,
        "layers": hybrid and {kinds[ratio] for ratio in v4.compress_ratios},
        "query rank": not hybrid and model.mla.q_lora_rank is not None,
        "residual": (model.residual, model.hyper_connection.read_out),
        "router": (model.router, model.moe.num_hash_layers > 0),
        "node limit": model.moe.num_expert_groups > model.moe.num_groups_per_token,
        "dense layers": model.num_dense_layers > 0,
        "shared experts": model.moe.num_shared_experts,
        "clamp": model.swiglu_limit,
        "memory": engram and (engram.ngram_orders, engram.conv_kernel_size),
        "multi-token prediction": (model.mtp_depth, model.mtp_kind),
    }
