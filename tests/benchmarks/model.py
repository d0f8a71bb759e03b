"""Speed of the model against transformers: `mneme bench model`.

Both train the same DeepSeek-V3-shaped model of 18 M parameters from the same weights on the same
batches, taking turns in one process on one thread, each with fused AdamW: once in bf16, once in
fp32. Time is CPU time, so a busy machine disturbs it little. Allocator and oneDNN settings are those
of `SETTINGS` for both: glibc would hand large blocks back to the kernel after every use, and oneDNN
compiles a matrix product anew for shapes that have left its cache.

The matmul rate is that of a square product in the same type, measured in between. It all takes about
four minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.bench import Row
from parallel.cross_entropy import summed_cross_entropy
from tests.parity.test_model_v3 import transformers_model
from tests.unit.train.model.tiny import build
from train.model.attention.config import MlaConfig
from train.model.config import ModelConfig
from train.model.moe.config import MoeConfig
from train.model.transformer import Transformer

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=67108864",
}
BATCH, SEQUENCE = 4, 512
# The heap of transformers in bf16 grows for some thirty steps, and until then every fresh page would
# count against it.
WARM_UP, STEPS = 30, 12
RATIO = {"bf16": 1.6, "fp32": 1.15}
SHARE_OF_MATMUL_RATE = 0.75
CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    num_layers=8,
    num_dense_layers=1,
    intermediate_size=1024,
    num_attention_heads=4,
    mla=MlaConfig(
        q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    residual="plain",
    router="sigmoid",
    moe=MoeConfig(num_experts=16, num_experts_per_token=4, expert_intermediate_size=128),
    swiglu_limit=None,
)


@dataclass(frozen=True)
class Result:
    """One type's figures; speeds in tokens per CPU second."""

    ours: float
    theirs: float
    ratio: float
    """Median of the ratios of neighbouring steps."""
    matmul: float
    """Floating-point operations per CPU second."""
    loss_difference: float
    """Largest relative difference of the two losses."""


def run() -> list[Row]:
    """Measure both types, each in a new process with `SETTINGS`."""
    for variable, value in SETTINGS.items():
        print(f"{variable}={value}", file=sys.stderr)
    return [row for name in RATIO for row in _rows(name, _measure_in_new_process(name))]


def _rows(name: str, result: Result) -> list[Row]:
    share = result.ours * flops_per_token() / result.matmul
    return [
        Row(
            case=f"{name}, step | transformers deepseek_v3; ratio at least {RATIO[name]}",
            value=result.ours,
            unit="tokens/CPU-s",
            peer=result.theirs,
            ratio=result.ratio,
            target=RATIO[name] * result.theirs,
            met=result.ratio >= RATIO[name],
        ),
        Row(
            case=f"{name}, share of the matmul rate in useful operations; goal",
            value=share,
            unit="",
            peer=result.theirs * flops_per_token() / result.matmul,
            ratio=result.ratio,
            target=SHARE_OF_MATMUL_RATE,
            met=share >= SHARE_OF_MATMUL_RATE,
        ),
        Row(case=f"{name}, matmul rate", value=result.matmul / 1e9, unit="GFLOP/s"),
        Row(
            case=f"{name}, largest difference of the two losses",
            value=result.loss_difference,
            unit="relative",
        ),
    ]


def flops_per_token() -> float:
    """Operations of matrix products in forward and backward: no recomputation, no masked scores."""
    mla, moe = CONFIG.mla, CONFIG.moe
    hidden, heads, rank = CONFIG.hidden_size, CONFIG.num_attention_heads, mla.q_lora_rank
    assert rank is not None
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    attention = hidden * (rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
    attention += heads * rank * qk + heads * mla.v_head_dim * hidden
    attention += heads * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    experts = moe.num_experts_per_token + moe.num_shared_experts
    sparse = hidden * (3 * experts * moe.expert_intermediate_size + moe.num_experts)
    sparse_layers = CONFIG.num_layers - CONFIG.num_dense_layers
    weights = CONFIG.num_layers * attention + sparse_layers * sparse + hidden * CONFIG.vocab_size
    weights += CONFIG.num_dense_layers * 3 * hidden * CONFIG.intermediate_size
    scores = CONFIG.num_layers * heads * (SEQUENCE / 2) * (qk + mla.v_head_dim)
    return 6 * (weights + scores)


def _measure_in_new_process(name: str) -> Result:
    command = [sys.executable, "-m", "tests.benchmarks.model", name]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, **SETTINGS}
    )
    return Result(**json.loads(done.stdout))


def measure(name: str) -> Result:
    """Take turns, step by step."""
    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    model = build(CONFIG)
    peer = transformers_model(model, attn_implementation="sdpa").to(dtype)
    model.to(dtype)
    for layer in model.moe_layers():
        layer.router.float()
    ours, theirs = Ours(model), Theirs(peer)
    generator = torch.Generator().manual_seed(0)
    seconds: list[tuple[float, float]] = []
    differences, rates = [], []
    for _ in range(WARM_UP + STEPS):
        ids = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
        (my_time, my_loss), (their_time, their_loss) = timed(ours, ids), timed(theirs, ids)
        seconds.append((my_time, their_time))
        differences.append(abs(my_loss - their_loss) / their_loss)
        rates.append(matmul_rate(dtype))
    my_times, their_times = zip(*seconds[WARM_UP:], strict=True)
    return Result(
        ours=BATCH * SEQUENCE / statistics.median(my_times),
        theirs=BATCH * SEQUENCE / statistics.median(their_times),
        ratio=statistics.median(theirs / ours for ours, theirs in seconds[WARM_UP:]),
        matmul=max(rates),
        loss_difference=max(differences),
    )


class Ours:
    """A training step of this project's model, the update of the router's bias included."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.train()
        self.optimizer = adamw(model)
        self.positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)

    def __call__(self, ids: Tensor) -> Tensor:
        """Train on one batch; the mean loss."""
        documents = torch.zeros_like(self.positions)
        logits = self.model(ids[:, :-1], self.positions, documents).logits
        loss = summed_cross_entropy(logits, ids[:, 1:]) / (BATCH * SEQUENCE)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer in self.model.moe_layers():
            layer.router.update_bias(layer.take_load_counts())
        return loss


class Theirs:
    """A training step of transformers' model with its own loss."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = adamw(model)

    def __call__(self, ids: Tensor) -> Tensor:
        """Train on one batch; the mean loss."""
        # shift_labels: token t+1 at position t, as ours.
        labels = ids[:, 1:].contiguous()
        output: Any = self.model(
            input_ids=ids[:, :-1], labels=labels, shift_labels=labels, use_cache=False
        )
        loss: Tensor = output.loss
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for both."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)


def timed(step: Ours | Theirs, ids: Tensor) -> tuple[float, float]:
    """CPU seconds of a step, and its loss."""
    started = time.process_time()
    loss = step(ids)
    return time.process_time() - started, loss.item()


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per CPU second of a square product, the better of two."""
    a, b = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        torch.mm(a, b)
        seconds.append(time.process_time() - started)
    return 2 * size**3 / min(seconds[1:])


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
