"""A mixture-of-experts model of a few hundred numbers, and its training on one rank without any of
our parallel code: what every layout has to equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.apply import ModelParts
from parallel.initialize import Init, fill_parameters

VOCAB, HIDDEN, WIDTH, K, SEQUENCE, BATCH = 18, 8, 6, 2, 6, 8
"""The vocabulary does not divide by 4, so that shards are uneven."""
LEARNING_RATE, MAX_NORM, STEPS, SEED = 1e-2, 0.05, 3, 11


def dense_dispatch(
    tokens: Tensor, indices: Tensor, weights: Tensor, experts: nn.Module
) -> Callable[[], Tensor]:
    """All experts on all tokens, the unchosen ones times zero: no sorting, no counts."""
    assert isinstance(experts, ToyExperts)
    gates = torch.zeros(len(tokens), len(experts.up), dtype=weights.dtype).scatter(
        1, indices, weights
    )
    hidden = torch.einsum("th,ehw->tew", tokens, experts.up).tanh()
    summed = torch.einsum("tew,ewh,te->th", hidden, experts.down, gates)
    return lambda: summed


class ToyExperts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(num_experts, WIDTH, HIDDEN))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = zip(
            torch.split(rows, counts.tolist()), self.up.unbind(), self.down.unbind(), strict=True
        )
        return torch.cat([(part @ up).tanh() @ down for part, up, down in parts])


class ToyRouter(nn.Module):
    """Kept in fp32 under bf16, as is ToyScale."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, HIDDEN))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(tokens.to(self.weight.dtype), self.weight).sigmoid()
        weights, indices = scores.topk(K, dim=-1)
        return indices, weights / weights.sum(-1, keepdim=True)


class ToyScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, stream: Tensor) -> Tensor:
        return (stream.to(self.weight.dtype) * self.weight).to(stream.dtype)


class ToyBlock(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.scale = ToyScale()
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.router = ToyRouter(num_experts)
        self.experts = ToyExperts(num_experts)
        self.num_experts = num_experts
        self.dispatch: Callable[[Tensor, Tensor, Tensor, nn.Module], Callable[[], Tensor]] = (
            dense_dispatch
        )

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.dense(self.scale(stream)).tanh()
        tokens = stream.flatten(0, 1)
        indices, weights = self.router(tokens)
        routed = self.dispatch(tokens, indices, weights, self.experts)()
        return stream + routed.view(stream.shape)


class Toy(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleDict({str(i): ToyBlock(num_experts) for i in range(2)})
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream: Tensor = self.embedding(input_ids)
        for block in self.layers.values():
            stream = block(stream)
        logits: Tensor = self.head(stream)
        return logits

    def blocks(self) -> list[ToyBlock]:
        return [block for block in self.layers.values() if isinstance(block, ToyBlock)]

    def parts(self) -> ModelParts:
        return ModelParts(
            root=self,
            blocks=self.blocks(),
            expert_modules=[block.experts for block in self.blocks()],
            dispatch_sites=self.blocks(),
            num_experts=self.blocks()[0].num_experts,
            fp32_modules=[[block.scale, block.router] for block in self.blocks()],
        )


def initialize(model: nn.Module) -> None:
    inits = {
        name: Init.constant(1.0) if "scale" in name else Init.normal(0.5)
        for name, _ in model.named_parameters()
    }
    fill_parameters(model.named_parameters(), inits, seed=SEED)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of a global batch; sequences have between none and all labels valid."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    valid = torch.randint(SEQUENCE + 1, (BATCH, 1), generator=generator)
    return ids, labels.masked_fill(torch.arange(SEQUENCE) >= valid, -100)


def summed_loss(model: nn.Module, ids: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    logits = model(ids)
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), reduction="sum")
    return loss / valid.to(wide)


@dataclass
class Trace:
    """What happened in each step; gradients before clipping and parameters after the step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)


def reference(num_experts: int) -> Trace:
    """Three clipped AdamW steps in fp64 with torch's own clipping."""
    model = Toy(num_experts).double()
    initialize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    trace = Trace()
    for step in range(STEPS):
        ids, labels = batch(step)
        loss = summed_loss(model, ids, labels, (labels >= 0).sum())
        torch.autograd.backward(loss)
        trace.losses.append(loss.item())
        trace.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        trace.norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
        trace.parameters.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return trace
