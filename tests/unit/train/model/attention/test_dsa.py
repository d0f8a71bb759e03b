"""Sparse attention of V3.2: its forms, its stages, and what each of them learns."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import TINY, build, packed, relative_error
from train.model.attention import gathered
from train.model.attention.config import IndexerConfig, IndexerStage
from train.model.attention.dsa import SparseLatentAttention
from train.model.attention.gathered import attend_to_selected
from train.model.attention.indexer import Visibility, index_scores, select, selection_mask
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.rotary import rotate_halves
from train.model.transformer import Transformer

LENGTHS = (9, 150, 41)
"""Longer than a chunk of the attention, whose first document is shorter than the selection."""
GATHERED, MASKED = 10, 30


def config(
    top_k: int, stage: IndexerStage = "sparse", heads: int = 16, **changes: Any
) -> ModelConfig:
    # With few heads none fires for some keys; they tie at 0, and which are selected is arbitrary.
    indexer = IndexerConfig(num_heads=heads, head_dim=6, top_k=top_k, stage=stage)
    return replace(TINY, attention="dsa", indexer=indexer, **changes)


def layer(top_k: int, stage: IndexerStage = "sparse", heads: int = 16) -> SparseLatentAttention:
    torch.manual_seed(0)
    made = SparseLatentAttention(config(top_k, stage, heads)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.indexer.loss_scale = 1.0
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    _, positions, documents = packed(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*positions.shape, 32, generator=generator, dtype=torch.float64)
    return x, positions, documents


def whole_matrices(made: SparseLatentAttention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index scores, attention per head, output and the mask, from the papers' formulas."""
    x, positions, documents = inputs()
    tokens = tokens_of(positions, documents)
    cos, sin = tables = made.tables(tokens)
    c, q_nope, q_rope, kv, k_rope = made.latents(x, tables, tokens.part)
    indexer, rope = made.indexer, made.rope
    key = indexer.k_norm(indexer.k(x))
    query = indexer.q_b(c.detach()).unflatten(-1, (16, 6))
    query = torch.cat([rotate_halves(query[..., :rope], cos, sin), query[..., rope:]], dim=-1)
    turned = rotate_halves(key[..., None, :rope], cos, sin).squeeze(2)
    key = torch.cat([turned, key[..., rope:]], dim=-1)
    products = torch.einsum("bthd,bsd->bths", query, key) * 6**-0.5
    scores = torch.einsum("bth,bths->bts", indexer.head_weights(x) * 16**-0.5, products.relu())

    allowed = ~Visibility.of_tokens(documents).hidden(0, x.shape[1], x.shape[1])
    if indexer.stage == "sparse":
        ranked = scores.masked_fill(~allowed, -torch.inf).topk(min(indexer.top_k, x.shape[1]))
        best = torch.zeros_like(allowed).scatter(-1, ranked.indices, True)
        allowed = allowed & best
    expanded = torch.unflatten(kv @ made.kv_b.weight.T, -1, (2, -1))
    logits = torch.einsum("bthn,bshn->bhts", q_nope, expanded[..., : made.nope])
    logits = (logits + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * made.scale
    p = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    out = made.o(torch.einsum("bhts,bshv->bthv", p, expanded[..., made.nope :]).flatten(2))
    return scores, p, out, allowed


def divergence(scores: Tensor, p: Tensor, allowed: Tensor) -> Tensor:
    """Equations 3 and 4: the teacher is summed over heads, each normalised over the allowed keys."""
    teacher = p.detach().sum(1)
    teacher = teacher / teacher.sum(-1, keepdim=True)
    log = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, 0.0)
    return (torch.xlogy(teacher, teacher) - teacher * log).sum()


@pytest.mark.parametrize(
    ("stage", "top_k"), [("sparse", GATHERED), ("sparse", MASKED), ("dense_warmup", GATHERED)]
)
def test_output_loss_and_every_gradient_equal_whole_matrices(
    stage: IndexerStage, top_k: int
) -> None:
    made = layer(top_k, stage)
    x, positions, documents = inputs()
    found = made(x, tokens_of(positions, documents))
    scores, p, wanted, allowed = whole_matrices(made)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    loss = divergence(scores, p, allowed)
    direction = torch.randn_like(found)
    names, leaves = zip(*made.named_parameters(), strict=True)
    mine = torch.autograd.grad((found * direction).sum(), leaves)
    reference = torch.autograd.grad((wanted * direction).sum() + loss, leaves)
    for name, grad, other in zip(names, mine, reference, strict=True):
        assert relative_error(grad, other) < 1e-10, name
    torch.testing.assert_close(made.indexer.take_sums()[0], loss.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("top_k", [200, 500])
def test_selecting_everything_is_the_dense_attention_bit_for_bit(top_k: int) -> None:
    sparse = layer(top_k)
    dense = MultiHeadLatentAttention(TINY).double()
    dense.load_state_dict(sparse.state_dict(), strict=False)
    x, positions, documents = inputs()
    found, wanted = (module(x, tokens_of(positions, documents)) for module in (sparse, dense))
    assert torch.equal(found, wanted)
    mine = dict(sparse.named_parameters())
    for name, parameter in dense.named_parameters():
        (ours,) = torch.autograd.grad(found.sum(), mine[name], retain_graph=True)
        (theirs,) = torch.autograd.grad(wanted.sum(), parameter, retain_graph=True)
        assert torch.equal(ours, theirs), name


def test_selecting_almost_everything_is_nearly_the_dense_attention() -> None:
    """Through the masked kernel, where every key is selected but the selection is not skipped."""
    made = layer(150)
    x, positions, documents = inputs()
    wanted = layer(500)(x, tokens_of(positions, documents))
    torch.testing.assert_close(
        made(x, tokens_of(positions, documents)), wanted, rtol=1e-12, atol=1e-12
    )


def test_gathering_in_bf16_stays_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_ROWS", 100)
    torch.manual_seed(0)
    query, kv = torch.randn(2, 40, 3, 8), torch.randn(2, 40, 8)
    selected = torch.randint(0, 40, (2, 40, 5), dtype=torch.int32)
    wanted = attend_to_selected(query, kv, selected, 6)
    leaf = kv.bfloat16().requires_grad_()
    found = attend_to_selected(query.bfloat16(), leaf, selected, 6)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted) < 0.02
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert grad.dtype == torch.bfloat16


def indexer_grads(model: Transformer) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if "indexer" in name}


def main_grads(model: Transformer) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if "indexer" not in name}


def backward(model: Transformer, *, language: float, indexing: float) -> None:
    for indexer in model.indexers():
        indexer.loss_scale = indexing
    model.zero_grad()
    output = model(*packed(LENGTHS))
    losses = [logits.square().mean() for logits in (output.logits, *output.mtp_logits)]
    (language * sum(losses)).backward()


def test_sparse_stage_teaches_each_part_by_its_own_loss() -> None:
    model = build(config(GATHERED, mtp_depth=1), noise=0.1)
    backward(model, language=1.0, indexing=0.5)
    both, main = indexer_grads(model), main_grads(model)
    assert all(g is not None and g.any() for g in both.values())
    backward(model, language=0.0, indexing=0.5)
    for name, grad in indexer_grads(model).items():
        assert torch.equal(grad, both[name]), name  # type: ignore[arg-type]
    backward(model, language=1.0, indexing=0.0)
    for name, grad in main_grads(model).items():
        assert grad is None or torch.equal(grad, main[name]), name  # type: ignore[arg-type]
    assert not any(g.any() for g in indexer_grads(model).values() if g is not None)


def test_warm_up_moves_nothing_but_the_indexer() -> None:
    model = build(config(GATHERED, "dense_warmup"), noise=0.1)
    assert model.is_frozen
    backward(model, language=1.0, indexing=1.0)
    assert all(g is not None and g.any() for g in indexer_grads(model).values())
    assert all(g is None for g in main_grads(model).values())


def test_after_the_warm_up_the_main_model_goes_on() -> None:
    model = build(config(GATHERED, "dense_warmup"), noise=0.1)
    model.set_indexer_stage("dense")
    assert not model.is_frozen
    backward(model, language=1.0, indexing=1.0)
    assert all(g is None for g in indexer_grads(model).values())
    assert all(g is not None for g in main_grads(model).values())


def test_the_stage_decides_what_is_attended_to() -> None:
    model = build(config(GATHERED, "dense"), noise=0.1)
    plain = build(TINY, noise=0.0)
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = packed(LENGTHS)
    wanted = plain(*batch).logits
    stages: tuple[IndexerStage, ...] = ("dense", "dense_warmup")
    for stage in stages:
        model.set_indexer_stage(stage)
        assert torch.equal(model(*batch).logits, wanted)
    model.set_indexer_stage("sparse")
    changed = (model(*batch).logits - wanted).abs().amax((0, 2)) > 1e-4
    # Only queries that see more tokens than they may select are moved.
    assert not changed[:9].any()
    assert changed[9 + GATHERED : 159].any()


def test_a_stage_without_an_indexer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.attention=mla has no indexer; use .*=dsa"):
        Transformer(TINY).set_indexer_stage("sparse")


def test_nothing_is_counted_without_training() -> None:
    made = layer(GATHERED)
    x, *places = inputs()
    with torch.no_grad():
        made(x, tokens_of(*places))
    made.eval()(x, tokens_of(*places))
    assert made.indexer.take_sums().tolist() == [0] * 4
    out = made.train()(x, tokens_of(*places))
    assert made.indexer.take_sums().tolist() == [0] * 4
    out.sum().backward()
    divergence, overlap, mass, queries = made.indexer.take_sums().tolist()
    assert divergence > 0
    assert 0 < overlap < queries <= 2 * 16
    assert overlap < mass + queries
    assert made.indexer.take_sums().tolist() == [0] * 4


def test_recall_is_that_of_the_selection_in_use() -> None:
    """Against the selection and the full attention of every query, at the sampled places."""
    made = layer(GATHERED)
    x, positions, documents = inputs()
    made(x, tokens_of(positions, documents)).sum().backward()
    _, overlap, _, queries = made.indexer.take_sums().tolist()
    made.indexer.stage = "dense_warmup"
    scores, p, _, allowed = whole_matrices(made)
    visible = Visibility.of_tokens(documents)
    tokens = tokens_of(positions, documents)
    tables, part = made.tables(tokens), tokens.part
    index = made.index(x, made.latents(x, tables, part).query, tables, part, idle=False)
    torch.testing.assert_close(index_scores(*index), scores)
    chosen = selection_mask(select(*index, visible, GATHERED), 200)
    best = torch.zeros_like(allowed).scatter(-1, p.sum(1).topk(GATHERED).indices, True)
    places = range(199, -1, -13)
    wanted = [
        int((chosen & best)[b, t].sum()) / GATHERED
        for b in range(2)
        for t in places
        if allowed[b, t].sum() > GATHERED
    ]
    assert (overlap, queries) == (pytest.approx(sum(wanted)), len(wanted))


def test_a_repeated_forward_pass_counts_once() -> None:
    made = layer(GATHERED)
    x, *places = inputs()
    counted = []
    for run in (made, partial(checkpoint, made, use_reentrant=False)):
        run(x.requires_grad_(), tokens_of(*places)).sum().backward()
        counted.append(made.indexer.take_sums())
    assert torch.equal(*counted)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most numbers that any operation, also in backward, put out."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("stage", "top_k"), [("sparse", 16), ("sparse", 256), ("dense_warmup", 16)]
)
def test_memory_grows_with_the_sequence_not_its_square(stage: IndexerStage, top_k: int) -> None:
    made = layer(top_k, stage, heads=2).float()
    largest, kept = [], []
    for seq in (512, 1024):
        x = torch.randn(1, seq, 32, requires_grad=True)
        positions = torch.arange(seq)[None]
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with LargestTensor() as seen:  # type: ignore[no-untyped-call]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = made(x, tokens_of(positions, positions * 0))
            out.sum().backward()
        largest.append(seen.numbers)
        kept.append(sum(tensor.numel() for tensor in saved))
        assert seen.numbers < seq * seq
    assert largest[1] <= 2 * largest[0]
    assert kept[1] <= 2 * kept[0]
