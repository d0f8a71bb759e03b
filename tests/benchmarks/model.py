"""Speed of the model against transformers: `mneme bench model`.

Both train the same DeepSeek-V3-shaped model of 18 M parameters from the same weights on the same
batches, taking turns in one process on one thread, each with fused AdamW: once in bf16, once in
fp32. Time is CPU time, so a busy machine disturbs it little. Allocator and oneDNN settings are those
of `SETTINGS` for both: glibc would hand large blocks back to the kernel after every use, and oneDNN
compiles a matrix product anew for shapes that have left its cache.

The matmul rate is that of a square product in the same type, measured in between. It all takes about
four minutes.

On an accelerator the model is larger (`ON_DEVICE`), in bf16 alone, and time is what passes.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from launch.bench import Row
from parallel.backend.kernels import choose
from parallel.cross_entropy import summed_cross_entropy
from tests.benchmarks.of_device.clock import Device
from tests.parity.test_model_v3 import transformers_model
from tests.unit.train.model.tiny import build
from train.lifetime import ALLOCATOR
from train.model.attention.config import MlaConfig
from train.model.config import ModelConfig
from train.model.initialize import parameter_init
from train.model.moe.config import MoeConfig
from train.model.transformer import Transformer

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    "GLIBC_TUNABLES": ALLOCATOR,
}
RATIO = {"bf16": 1.6, "fp32": 1.15}
"""Promised on a processor, by type."""
SHARE_OF_MATMUL_RATE = 0.75


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained."""

    config: ModelConfig
    batch: int
    sequence: int
    warm_up: int
    steps: int
    matmul: int
    """Rows of the square product."""


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
# The heap of transformers in bf16 grows for some thirty steps, and until then every fresh page would
# count against it.
ON_HOST = Sizes(config=CONFIG, batch=4, sequence=512, warm_up=30, steps=12, matmul=1024)
ON_DEVICE = Sizes(
    config=replace(
        CONFIG,
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        mla=MlaConfig(
            q_lora_rank=1024,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoeConfig(num_experts=32, num_experts_per_token=4, expert_intermediate_size=1024),
    ),
    batch=4,
    sequence=4096,
    warm_up=4,
    steps=8,
    matmul=8192,
)


@dataclass(frozen=True)
class Result:
    """One type's figures; speeds in tokens per second: CPU time on the host."""

    ours: float
    theirs: float
    ratio: float
    """Median of the ratios of neighbouring steps."""
    matmul: float
    """Floating-point operations per second."""
    loss_difference: float
    """Largest relative difference of the two losses."""


def run() -> list[Row]:
    """Measure every type, each in a new process with `SETTINGS`."""
    device = Device()
    if not device.is_host:
        return _rows("bf16", _measure_in_new_process("bf16"), device)
    for variable, value in SETTINGS.items():
        print(f"{variable}={value}", file=sys.stderr)
    return [row for name in RATIO for row in _rows(name, _measure_in_new_process(name), device)]


def _rows(name: str, result: Result, device: Device) -> list[Row]:
    sizes = sizes_on(device)
    share = result.ours * flops_per_token(sizes) / result.matmul
    ratio, goal = (RATIO[name], SHARE_OF_MATMUL_RATE) if device.is_host else (None, None)
    promise = "" if ratio is None else f"; ratio at least {ratio}"
    return [
        Row(
            case=f"{name}, step | transformers deepseek_v3{promise}",
            value=result.ours,
            unit=device.tokens_per_second,
            peer=result.theirs,
            ratio=result.ratio,
            target=None if ratio is None else ratio * result.theirs,
            met=None if ratio is None else result.ratio >= ratio,
        ),
        Row(
            case=f"{name}, share of the matmul rate in useful operations"
            + "; goal" * bool(promise),
            value=share,
            unit="",
            peer=result.theirs * flops_per_token(sizes) / result.matmul,
            ratio=result.ratio,
            target=goal,
            met=None if goal is None else share >= goal,
        ),
        Row(case=f"{name}, matmul rate", value=result.matmul / 1e9, unit="GFLOP/s"),
        Row(
            case=f"{name}, largest difference of the two losses",
            value=result.loss_difference,
            unit="relative",
        ),
    ]


def sizes_on(device: Device) -> Sizes:
    """What makes sense on the device."""
    return ON_HOST if device.is_host else ON_DEVICE


def flops_per_token(sizes: Sizes) -> float:
    """Operations of matrix products in forward and backward: no recomputation, no masked scores."""
    config = sizes.config
    mla, moe = config.mla, config.moe
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, mla.q_lora_rank
    assert rank is not None
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    attention = hidden * (rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
    attention += heads * rank * qk + heads * mla.v_head_dim * hidden
    attention += heads * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    experts = moe.num_experts_per_token + moe.num_shared_experts
    sparse = hidden * (3 * experts * moe.expert_intermediate_size + moe.num_experts)
    sparse_layers = config.num_layers - config.num_dense_layers
    weights = config.num_layers * attention + sparse_layers * sparse + hidden * config.vocab_size
    weights += config.num_dense_layers * 3 * hidden * config.intermediate_size
    scores = config.num_layers * heads * (sizes.sequence / 2) * (qk + mla.v_head_dim)
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
    device = Device()
    sizes = sizes_on(device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    ours, theirs = models(sizes.config, dtype, device)
    generator = torch.Generator().manual_seed(0)
    seconds: list[tuple[float, float]] = []
    differences, rates = [], []
    for _ in range(sizes.warm_up + sizes.steps):
        shape = (sizes.batch, sizes.sequence + 1)
        ids = torch.randint(0, sizes.config.vocab_size, shape, generator=generator)
        ids = ids.to(device.torch_device)
        (my_time, my_loss), (their_time, their_loss) = (
            timed(device, step, ids) for step in (ours, theirs)
        )
        seconds.append((my_time, their_time))
        differences.append(abs(my_loss - their_loss) / their_loss)
        rates.append(device.matmul_rate(dtype, sizes.matmul))
    seconds = seconds[sizes.warm_up :]
    my_times, their_times = zip(*seconds, strict=True)
    return Result(
        ours=sizes.batch * sizes.sequence / statistics.median(my_times),
        theirs=sizes.batch * sizes.sequence / statistics.median(their_times),
        ratio=statistics.median(theirs / ours for ours, theirs in seconds),
        matmul=max(rates),
        loss_difference=max(differences),
    )


def models(config: ModelConfig, dtype: torch.dtype, device: Device) -> tuple["Ours", "Theirs"]:
    """Both, with the same weights."""
    model = build(config) if device.is_host else build_there(config, device)
    with device.torch_device:
        peer = transformers_model(model, attn_implementation="sdpa").to(dtype)
    model.to(dtype)
    for layer in model.moe_layers():
        layer.router.float()
    for site in model.parts().attention_sites:
        site.dense_attention = choose("kernels.attention", "auto", device.torch_device.type)
    return Ours(model), Theirs(peer)


def build_there(config: ModelConfig, device: Device) -> Transformer:
    """A model on the device, which draws its start values by itself: the host would take minutes."""
    with device.torch_device:
        model = Transformer(config)
    inits = parameter_init(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            init = inits[name]
            if init.kind == "normal":
                parameter.normal_(0.0, init.value)
            elif init.values is not None:
                parameter.copy_(init.values)
            else:
                parameter.fill_(init.value)
    return model


class Ours:
    """A training step of this project's model, the update of the router's bias included."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.train()
        self.optimizer = adamw(model)

    def __call__(self, ids: Tensor) -> Tensor:
        """Train on one batch; the mean loss."""
        inputs, labels = ids[:, :-1], ids[:, 1:]
        positions = torch.arange(inputs.shape[1], device=ids.device).expand_as(inputs)
        logits = self.model(inputs, positions, torch.zeros_like(positions)).logits
        loss = summed_cross_entropy(logits, labels) / labels.numel()
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


def timed(device: Device, step: Ours | Theirs, ids: Tensor) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    started = device.now()
    loss = step(ids)
    return device.now() - started, loss.item()


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
