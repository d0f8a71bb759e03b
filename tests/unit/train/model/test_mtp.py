import pytest
import torch
from torch import Tensor

from tests.tokens import tokens_of
from tests.unit.train.model.tiny import FULL, build, packed, relative_error, with_changes
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.mtp import ConcatenatedPrediction, StreamPrediction, mtp_labels
from train.model.streams import Streams, expand_streams
from train.model.tokens import next_tokens

GATED = HyperConnectionConfig(read_out="gated")
V4 = with_changes(FULL, mtp_kind="v4", hyper_connection=GATED)

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])
IDS = torch.tensor([[10, 11, 12, 20, 21, 30, 40, 41]])
LABELS = torch.tensor([[11, 12, -100, 21, -100, -100, 41, 42]])


def test_next_tokens_and_labels_align_within_documents() -> None:
    assert next_tokens(IDS, DOCUMENTS).tolist() == [[11, 12, 12, 21, 21, 30, 41, 41]]
    # The last document goes on after the sequence, so its last label is token 42.
    assert mtp_labels(LABELS, DOCUMENTS).tolist() == [[12, -100, -100, -100, -100, -100, 42, -100]]


@pytest.mark.parametrize("config", [FULL, V4], ids=["v3", "v4"])
def test_logits_for_t_plus_2_read_token_t_plus_1_and_no_later_one(config: ModelConfig) -> None:
    model = build(config, noise=0.05)
    ids, positions, documents = packed((8,), batch=1)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    before, after = model(ids, positions, documents), model(changed, positions, documents)
    # Not bitwise: a token that is routed elsewhere changes the rounding of others' products.
    moved = (before.mtp_logits[0] - after.mtp_logits[0]).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 4
    moved = (before.logits - after.logits).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("config", [FULL, V4], ids=["v3", "v4"])
def test_embedding_and_head_are_shared(config: ModelConfig) -> None:
    model = build(config, noise=0.05)
    names = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert not [name for name in names if "embedding.weight" in name or ".head" in name]
    (mtp_logits,) = model(*packed((6,))).mtp_logits
    grads = torch.autograd.grad(mtp_logits.sum(), [model.embedding.weight, model.head.weight])
    assert all(grad.abs().sum() > 0 for grad in grads)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_v3_projects_the_read_out_beside_the_embedding() -> None:
    """arXiv 2412.19437, eq. 21, written with the two halves of the projection."""
    (module,) = build(with_changes(FULL, residual="mhc"), noise=0.1).mtp
    assert isinstance(module, ConcatenatedPrediction)
    hidden, embedding, stream = (
        torch.randn(2, 5, 32),
        torch.randn(2, 5, 32),
        torch.randn(2, 5, 4, 32),
    )
    found = module.enter(hidden, Streams(stream), module.embedding_norm(embedding)).x
    left, right = torch.split(module.project.weight, 32, dim=1)
    wanted = rms(hidden, module.hidden_norm.weight) @ left.T
    wanted = wanted + rms(embedding, module.embedding_norm.weight) @ right.T
    for m in range(4):
        assert relative_error(found[:, :, m], wanted) < 1e-6


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc", "mhc_single_pass"])
def test_v4_enters_every_stream_and_the_embedding(residual: str) -> None:
    """x'_m = e_proj(enorm(e)) + h_proj(hnorm(x_m)), as in V4's released code; then its own head."""
    model = build(with_changes(V4, residual=residual), noise=0.1)
    (module,) = model.mtp
    assert isinstance(module, StreamPrediction)
    embedding = torch.randn(2, 5, 32)
    start = expand_streams(torch.randn(2, 5, 32), model.config)
    streams = start._replace(x=torch.randn(start.x.shape))
    entered = module.enter(torch.empty(0), streams, module.embedding_norm(embedding))
    for m in range(streams.x.shape[2]):
        wanted = rms(embedding, module.embedding_norm.weight) @ module.embedding_project.weight.T
        wanted = wanted + (
            rms(streams.x[:, :, m], module.hidden_norm.weight) @ module.hidden_project.weight.T
        )
        assert relative_error(entered.x[:, :, m], wanted) < 1e-6
    assert entered.read is streams.read

    ids, positions, documents = packed((5,))
    found = module(
        torch.empty(2, 5, 32),
        streams,
        embedding,
        tokens_of(positions, documents, ids),
    )
    left = module.block(entered, tokens_of(positions, documents, ids))
    wanted = rms(module.read_out(left), module.norm.weight)
    assert relative_error(found, wanted) < 1e-6
    assert module.read_out is not model.read_out
