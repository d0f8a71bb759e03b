"""Routing conserves tokens, and every rule about which experts a token may see holds."""

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, autograd, manual_seed, nn, randint, randn

from tests.tokens import tokens_of
from train.model.moe.config import MoeConfig
from train.model.moe.hash_table import token_expert_table
from train.model.moe.router import HashRouter, Router, TopKRouter

KINDS = st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])


@st.composite
def moe_configs(draw: st.DrawFn) -> MoeConfig:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    chosen = draw(st.integers(1, groups))
    return MoeConfig(
        num_experts=groups * size,
        num_experts_per_token=draw(st.integers(1, chosen * size)),
        num_expert_groups=groups,
        num_groups_per_token=chosen,
        routed_scaling_factor=2.5,
    )


def check(router: Router, config: MoeConfig, seed: int, tokens: int) -> Tensor:
    """Route random tokens; distinct experts, weights that add up, all tokens counted."""
    manual_seed(seed)
    for tensor in [router.weight, *(b for b in router.buffers() if b.is_floating_point())]:
        nn.init.normal_(tensor)
    ids = randint(0, 50, (2, tokens))
    router.load_counts.zero_()
    indices: Tensor
    indices, weights = router(randn(2, tokens, 8), tokens_of(ids, ids, ids))
    autograd.backward(weights.sum())
    k = config.num_experts_per_token
    assert int(router.load_counts.sum()) == 2 * tokens * k
    assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())
    assert indices.min() >= 0
    assert indices.max() < config.num_experts
    assert ((weights.sum(-1) - 2.5).abs() < 1e-5).all()
    return indices


@settings(max_examples=50, deadline=None)
@given(config=moe_configs(), kind=KINDS, seed=st.integers(0, 1000), tokens=st.integers(1, 20))
def test_scored_routing(config: MoeConfig, kind: str, seed: int, tokens: int) -> None:
    indices = check(TopKRouter(config, kind, 8), config, seed, tokens)  # type: ignore[arg-type]
    size = config.num_experts // config.num_expert_groups
    for row in (indices // size).flatten(0, 1).tolist():
        assert len(set(row)) <= config.num_groups_per_token


@settings(max_examples=30, deadline=None)
@given(config=moe_configs(), seed=st.integers(0, 1000), tokens=st.integers(1, 20))
def test_hash_routing(config: MoeConfig, seed: int, tokens: int) -> None:
    check(HashRouter(config, "hash", 8, 50, seed), config, seed, tokens)


@settings(max_examples=50, deadline=None)
@given(
    vocab=st.integers(1, 300), experts=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99)
)
def test_every_expert_has_an_even_share_of_the_vocabulary(
    vocab: int, experts: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, experts))
    table = token_expert_table(vocab, experts, k, seed=seed, layer_index=1)
    assert table.shape == (vocab, k)
    assert all(len(set(row)) == k for row in table.tolist())
    for start in range(0, vocab - experts + 1, experts):
        block = table[start : start + experts].flatten().tolist()
        assert all(block.count(expert) == k for expert in range(experts))
