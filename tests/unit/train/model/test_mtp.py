import torch

from tests.unit.train.model.tiny import FULL, build, packed
from train.model.mtp import mtp_labels, next_tokens

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])
IDS = torch.tensor([[10, 11, 12, 20, 21, 30, 40, 41]])
LABELS = torch.tensor([[11, 12, -100, 21, -100, -100, 41, 42]])


def test_next_tokens_and_labels_align_within_documents() -> None:
    assert next_tokens(IDS, DOCUMENTS).tolist() == [[11, 12, 12, 21, 21, 30, 41, 41]]
    # The last document goes on after the sequence, so its last label is token 42.
    assert mtp_labels(LABELS, DOCUMENTS).tolist() == [[12, -100, -100, -100, -100, -100, 42, -100]]


def test_logits_for_t_plus_2_read_token_t_plus_1_and_no_later_one() -> None:
    model = build(FULL, noise=0.05)
    ids, positions, documents = packed((8,), batch=1)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    before, after = model(ids, positions, documents), model(changed, positions, documents)
    # Not bitwise: a token that is routed elsewhere changes the rounding of others' products.
    moved = (before.mtp_logits[0] - after.mtp_logits[0]).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 4
    moved = (before.logits - after.logits).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 5 + [True] * 3


def test_embedding_and_head_are_shared() -> None:
    model = build(FULL, noise=0.05)
    names = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert not [name for name in names if "embedding.weight" in name or "head" in name]
    (mtp_logits,) = model(*packed((6,))).mtp_logits
    grads = torch.autograd.grad(mtp_logits.sum(), [model.embedding.weight, model.head.weight])
    assert all(grad.abs().sum() > 0 for grad in grads)
