"""Cost of mHC's residual streams over a plain residual: `mneme bench mhc`.

Forward and backward of one inner transformer block (MLA and a dense SwiGLU) over 2048 tokens on one
thread, in CPU time. The kinds take turns in every round, in one process, with glibc told to keep
freed memory: page faults otherwise cost more than the arithmetic of the streams. The ratio is the
median of the rounds' ratios, because neighbours on the machine come and go. Compilation is not
timed. On an accelerator: 8192 tokens of wider blocks in bf16, in time that passes.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from typing import NamedTuple

import torch

from launch.bench import Row
from parallel.initialize import fill_parameters
from tests.benchmarks.of_device.clock import Device
from train.lifetime import ALLOCATOR
from train.model.attention.config import MlaConfig
from train.model.config import HyperConnectionConfig, ModelConfig
from train.model.initialize import parameter_init
from train.model.streams import Streams, expand_streams
from train.model.tokens import Tokens
from train.model.transformer import Transformer

ROUNDS, WARM_UP = 9, 2
TARGETS = {512: 1.15, 1024: 1.08}
"""Promised ratio of the compiled form on a processor, by hidden size."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = {True: 2048, False: 8192}
"""On the host, and on an accelerator."""
ON_DEVICE = ((2048, "bf16"), (4096, "bf16"))
"""Hidden sizes and types that are measured there."""


class Kind(NamedTuple):
    """One form of the residual."""

    name: str
    residual: str
    compile: bool = False


KINDS = (
    Kind("plain", "plain"),
    Kind("mHC eager", "mhc"),
    Kind("mHC compiled", "mhc", compile=True),
    Kind("single-pass mHC compiled", "mhc_single_pass", compile=True),
)


def run() -> list[Row]:
    """Measure every width and type in a process of its own."""
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR, "OMP_NUM_THREADS": "1"}
    on_host = itertools.product(TARGETS, DTYPES)
    rows = []
    for hidden, dtype in on_host if Device().is_host else ON_DEVICE:
        command = [sys.executable, "-m", "tests.benchmarks.mhc", str(hidden), dtype]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        seconds: dict[str, list[float]] = json.loads(answer.stdout)
        rows += [compared(kind, hidden, dtype, seconds) for kind in KINDS[1:]]
    return rows


def compared(kind: Kind, hidden: int, dtype: str, seconds: dict[str, list[float]]) -> Row:
    """A kind beside the plain residual."""
    found, plain = seconds[kind.name], seconds[KINDS[0].name]
    ratio = statistics.median(a / b for a, b in zip(found, plain, strict=True))
    target = TARGETS.get(hidden) if kind.compile else None
    promise = "; target of the ratio" if hidden in TARGETS else ""
    return Row(
        case=f"{kind.name} | plain, hidden {hidden}, {dtype}{promise}",
        value=1e3 * statistics.median(found),
        unit="ms",
        peer=1e3 * statistics.median(plain),
        ratio=ratio,
        target=target,
        met=None if target is None else ratio <= target,
    )


def measure(hidden: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of every round, by kind."""
    torch.set_num_threads(1)
    device = Device()
    steps = {kind.name: Step(kind, hidden, dtype, device) for kind in KINDS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            taken = device.seconds(step)
            if turn >= WARM_UP:
                seconds[name].append(taken)
    return seconds


class Step:
    """Forward and backward of a block of one kind."""

    def __init__(self, kind: Kind, hidden: int, dtype: torch.dtype, device: Device) -> None:
        self.config = ModelConfig(
            vocab_size=8,
            hidden_size=hidden,
            num_layers=1,
            intermediate_size=hidden * 8 // 3,
            num_attention_heads=hidden // 64,
            mla=MlaConfig(
                q_lora_rank=hidden // 2,
                kv_lora_rank=hidden // 4,
                qk_nope_head_dim=64,
                qk_rope_head_dim=32,
                v_head_dim=64,
            ),
            residual=kind.residual,  # type: ignore[arg-type]
            hyper_connection=HyperConnectionConfig(compile=kind.compile),
        )
        model = Transformer(self.config)
        fill_parameters(model.named_parameters(), parameter_init(model), seed=0)
        model.to(device.torch_device)
        (self.block,) = model.blocks()
        kept = {
            id(p) for group in model.parts().fp32_modules for m in group for p in m.parameters()
        }
        for parameter in self.block.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
        torch.manual_seed(0)
        tokens = TOKENS[device.is_host]
        x = torch.randn(1, tokens, hidden).to(device.torch_device, dtype)
        streams = expand_streams(x, self.config)
        read = None if streams.read is None else streams.read.requires_grad_()
        self.streams = Streams(streams.x.requires_grad_(), read)
        self.grad = torch.randn(streams.x.shape).to(device.torch_device, dtype)
        self.places = torch.arange(tokens, device=device.torch_device).unsqueeze(0)

    def __call__(self) -> None:
        """All gradients of the block and of the streams that enter it."""
        ids = torch.zeros_like(self.places)
        left = self.block(self.streams, Tokens.whole(ids, self.places, ids))
        leaves = [*self.streams.tensors(), *self.block.parameters()]
        torch.autograd.grad(left.x, leaves, self.grad)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), DTYPES[sys.argv[2]])))
