import torch
from torch import Tensor

from tests.unit.train.model.tiny import FULL, build, packed, with_changes
from train.model.config import ModelConfig
from train.model.transformer import Transformer
from train.parity.outputs import OutputWatch

PLAIN = with_changes(FULL, residual="plain", num_layers=2)
BLOCK = ("attention_site.0", "attention_site.x", "attention_norm", "attention", "ffn_site.0")
AFTER = (*BLOCK, "ffn_site.x", "ffn_norm")
MOE = ("ffn.router.0", "ffn.router.1", "ffn.shared", "ffn")
EXPECTED = [
    "embedding",
    *(f"layers.0.{name}" for name in AFTER),
    "layers.0.x",
    "layers.1.engram",
    *(f"layers.1.{name}" for name in (*AFTER, *MOE)),
    "layers.1.x",
    "read_out",
    "norm",
    "head",
    "mtp.0.embedding_norm",
    "mtp.0.hidden_norm",
    "mtp.0.project",
    *(f"mtp.0.block.{name}" for name in (*AFTER, *MOE)),
    "mtp.0.block.x",
    "mtp.0.read_out",
    "mtp.0.norm",
    "mtp.0",
    "head of MTP",
]


def watched(model: Transformer, chosen: set[int], microbatches: int = 1) -> list[tuple[int, str]]:
    seen: list[tuple[int, str]] = []

    def see(microbatch: int, name: str, value: Tensor) -> None:
        assert not value.requires_grad
        assert value.shape[:2] == (2, 11)
        seen.append((microbatch, name))

    watch = OutputWatch(model, see)
    watch.start_step(chosen)
    for _ in range(microbatches):
        output = model(*packed((7, 4)))
        (output.logits.sum() + output.mtp_logits[0].sum()).backward()
    return seen


def test_outputs_come_in_the_order_of_the_forward_pass() -> None:
    assert [name for _, name in watched(build(PLAIN), {0})] == EXPECTED


def test_every_kind_of_model_is_watched() -> None:
    def names(config: ModelConfig) -> set[str]:
        return {name for _, name in watched(build(config), {0})}

    mhc = names(with_changes(FULL, attention="dsa"))
    assert {f"layers.2.ffn_site.{name}" for name in ("0", "x", "post", "res")} < mhc
    single = names(with_changes(FULL, residual="mhc_single_pass", router="hash"))
    assert {"layers.0.attention_site.next_read", "layers.2.read", "layers.1.ffn.router.0"} < single


def test_only_chosen_microbatches_are_seen() -> None:
    seen = watched(build(PLAIN), {0, 2}, microbatches=4)
    assert seen == [(microbatch, name) for microbatch in (0, 2) for name in EXPECTED]
    assert watched(build(PLAIN), set(), microbatches=1) == []


def test_parameters_are_ordered_by_the_module_that_uses_them() -> None:
    model = build(PLAIN)
    watch = OutputWatch(model, lambda microbatch, name, value: None)
    assert watch.place_of("head.weight") == -1
    watch.start_step({0})
    for _ in range(2):
        model(*packed((7, 4)))
    names = sorted((name for name, _ in model.named_parameters()), key=watch.place_of)
    assert names[0] == "embedding.weight"
    assert names.index("layers.0.attention.o.weight") < names.index("layers.0.ffn_norm.weight")
    assert names.index("layers.1.engram.table.weight") < names.index("layers.1.engram.conv")
    assert names.index("layers.1.ffn.router.weight") < names.index(
        "layers.1.ffn.shared.down.weight"
    )
    assert names[-1] == "mtp.0.norm.weight"


def test_recomputation_is_not_seen() -> None:
    model, runs = build(PLAIN), []
    model.recompute("full")
    for block in model.blocks():
        block.attention.register_forward_hook(lambda module, args, output: runs.append(module))
    assert [name for _, name in watched(model, {0})] == EXPECTED
    assert len(runs) == 2 * len(model.blocks())


def test_a_watch_changes_nothing() -> None:
    plain, seen = build(FULL), build(FULL)
    OutputWatch(seen, lambda microbatch, name, value: None).start_step({0})
    ours, theirs = (model(*packed((7, 4))) for model in (plain, seen))
    assert torch.equal(ours.logits, theirs.logits)
    ours.logits.sum().backward()
    theirs.logits.sum().backward()
    for one, other in zip(plain.parameters(), seen.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
