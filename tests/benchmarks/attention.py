"""Cost of attention per token against the context length: `mneme bench attention`.

One layer, forward and backward, one document, one thread, fp32: CPU time per token and the peak of
resident memory, each point in a process of its own with the same allocator settings. A point that
would take longer than `Sizes.limit_seconds`, judged by the one before it, is not run and named as
such. To add an attention, add it to `LAYERS`.

On an accelerator the layer is wider, in bf16, and sequences are longer: time that passes, and the
peak of the device's memory, all in one process, with each point on stderr as it comes.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from launch.bench import Row
from tests.benchmarks.of_device.clock import Device
from train.lifetime import ALLOCATOR
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import CompressedConfig, IndexerConfig, MlaConfig
from train.model.attention.dsa import SparseLatentAttention
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    config: ModelConfig
    dtype: torch.dtype
    lengths: tuple[int, ...]
    limit_seconds: float
    repeat_seconds: float
    """A point is repeated while it has taken less than this; the fastest run counts. The first one
    pays for fresh memory, which doubled the time of the cheapest layers at 32K tokens."""


CONFIG = ModelConfig(
    hidden_size=256,
    num_attention_heads=4,
    mla=MlaConfig(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    indexer=IndexerConfig(num_heads=4, head_dim=32, top_k=512),
    # A key-value row as wide as the latent of MLA with its rotary key.
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 128),
        hca_ratio=128,
        sliding_window=128,
        head_dim=96,
        rope_head_dim=32,
    ),
)
ON_HOST = Sizes(
    config=CONFIG,
    dtype=torch.float32,
    lengths=(2048, 4096, 8192, 16384, 32768, 65536),
    limit_seconds=180.0,
    repeat_seconds=8.0,
)
ON_DEVICE = Sizes(
    config=ModelConfig(
        hidden_size=2048,
        num_attention_heads=16,
        mla=MlaConfig(
            q_lora_rank=1024,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        indexer=IndexerConfig(num_heads=16, head_dim=128, top_k=1024),
        compressed=CompressedConfig(
            compress_ratios=(0, 4, 128),
            hca_ratio=128,
            sliding_window=128,
            head_dim=192,
            rope_head_dim=64,
        ),
    ),
    dtype=torch.bfloat16,
    lengths=(4096, 8192, 16384, 32768, 65536, 131072),
    limit_seconds=4.0,
    repeat_seconds=0.2,
)
DENSE = "dense MLA"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Otherwise glibc hands every large block back to the kernel, and page faults are what is timed.
    "GLIBC_TUNABLES": ALLOCATOR,
}


def idle_indexer(layer: nn.Module) -> nn.Module:
    """Selects, but does not learn, as after pre-training."""
    layer.get_submodule("indexer").eval()
    return layer


def hybrid(config: ModelConfig, ratio: int) -> HybridAttention:
    """The layer of V4 with this compression ratio."""
    return HybridAttention(config, config.compressed.compress_ratios.index(ratio))


LAYERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    DENSE: MultiHeadLatentAttention,
    "DSA top-{}": SparseLatentAttention,
    "DSA top-{}, indexer not learning": lambda config: idle_indexer(SparseLatentAttention(config)),
    "CSA 4, top-{}": lambda config: hybrid(config, 4),
    "CSA 4, top-{}, indexer not learning": lambda config: idle_indexer(hybrid(config, 4)),
    "HCA 128": lambda config: hybrid(config, 128),
    "window 128": lambda config: hybrid(config, 0),
}


def run() -> list[Row]:
    """Measure every layer at every length, then compare."""
    device = Device()
    rows = []
    costs: dict[str, dict[int, float]] = {}
    for name in LAYERS:
        found, memory, skipped = measure_layer(name, device)
        costs[name] = found
        for length, cost in found.items():
            peer = costs[DENSE].get(length) if name != DENSE else None
            rows.append(
                Row(
                    case=f"{title(name, device)}, {length} tokens"
                    + (f" | {DENSE}" if peer else ""),
                    value=cost,
                    unit="us/token",
                    peer=peer,
                    ratio=cost / peer if peer else None,
                )
            )
        rows += [
            Row(
                case=f"{title(name, device)}, {length} tokens: not run, would take",
                value=seconds,
                unit="s",
            )
            for length, seconds in skipped.items()
        ]
        rows += memory_rows(title(name, device), memory)
        if name != DENSE:
            rows.append(crossover(title(name, device), found, costs[DENSE]))
    return rows


def sizes_on(device: Device) -> Sizes:
    """What makes sense on the device."""
    return ON_HOST if device.is_host else ON_DEVICE


def title(name: str, device: Device) -> str:
    """The layer's name with the number of keys that it selects."""
    return name.format(sizes_on(device).config.indexer.top_k)


def measure_layer(
    name: str, device: Device
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """By length: microseconds per token, peak MiB, and seconds that a point would have taken."""
    sizes = sizes_on(device)
    costs: dict[int, float] = {}
    memory: dict[int, float] = {}
    skipped: dict[int, float] = {}
    predicted = 0.0
    for length in sizes.lengths:
        if predicted > sizes.limit_seconds:
            skipped[length] = predicted
            predicted *= 4
            continue
        point = measure_apart(name, length) if device.is_host else measure(name, length, device)
        costs[length], memory[length] = 1e6 * point["seconds"] / length, point["mebibytes"]
        # At most quadratic in the length.
        predicted = 4 * point["seconds"]
    return costs, memory, skipped


def memory_rows(name: str, memory: dict[int, float]) -> list[Row]:
    """Peak at each length, and its growth over the last doubling: 2 where it is linear."""
    rows = [
        Row(case=f"{name}, {length} tokens: peak memory", value=mebibytes, unit="MiB")
        for length, mebibytes in memory.items()
    ]
    half, longest = sorted(memory)[-2:]
    growth = memory[longest] / memory[half]
    case = f"{name}: peak memory, {longest} over {half} tokens"
    return [*rows, Row(case=case, value=growth, unit="x", target=2.2, met=growth <= 2.2)]


def crossover(name: str, costs: dict[int, float], dense: dict[int, float]) -> Row:
    """Length from which a layer is cheaper than dense attention.

    Interpolated between the measured lengths on a line of the cost per token; beyond the longest
    that both have, extrapolated from the last two and marked so.
    """
    lengths = sorted(costs.keys() & dense.keys())
    gaps = {length: dense[length] - costs[length] for length in lengths}
    word = "cheaper than dense from"
    if gaps[lengths[0]] > 0:
        return Row(case=f"{name}: {word}, at the latest", value=float(lengths[0]), unit="tokens")
    pairs = list(itertools.pairwise(lengths))
    low, high = next((pair for pair in pairs if gaps[pair[1]] > 0), pairs[-1])
    if gaps[high] <= 0:
        word += ", extrapolated"
    slope = (gaps[high] - gaps[low]) / (high - low)
    if slope <= 0:
        case = f"{name}: not cheaper than dense, and not getting cheaper, at"
        return Row(case=case, value=float(high), unit="tokens")
    return Row(case=f"{name}: {word}", value=low - gaps[low] / slope, unit="tokens")


def measure_apart(name: str, length: int) -> dict[str, float]:
    """`measure` in a new process."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.attention", name, str(length)],
        check=True,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    point: dict[str, float] = json.loads(answer.stdout)
    return point


def measure(name: str, length: int, device: Device) -> dict[str, float]:
    """Seconds of a forward and backward pass, and its peak of memory above the start."""
    torch.manual_seed(0)
    sizes = sizes_on(device)
    layer = LAYERS[name](sizes.config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    place(layer, sizes.dtype, device)
    x = torch.randn(1, length, sizes.config.hidden_size).to(device.torch_device, sizes.dtype)
    x.requires_grad_()
    positions = torch.arange(length, device=device.torch_device)[None]
    documents = torch.zeros_like(positions)
    tokens = Tokens.whole(documents, positions, documents)
    if not device.is_host:  # each host's point is in a process of its own
        device.backend.reset_peak_memory()
    before = peak_bytes(device)
    times: list[float] = []
    while sum(times) < sizes.repeat_seconds:
        times.append(device.seconds(lambda: layer(x, tokens).sum().backward()))
    point = {"seconds": min(times), "mebibytes": (peak_bytes(device) - before) / 2**20}
    if not device.is_host:
        print(name, length, point, file=sys.stderr, flush=True)
    return point


def place(layer: nn.Module, dtype: torch.dtype, device: Device) -> None:
    """Put a layer on the device, in the types of a training run."""
    layer.to(device.torch_device, dtype)
    for module in layer.modules():
        for kept in getattr(module, "fp32_modules", list)():
            kept.float()


def peak_bytes(device: Device) -> int:
    """Largest memory until now: of the process on the host, else of the device since the reset."""
    if device.is_host:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return device.backend.peak_memory_bytes()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Device())))
