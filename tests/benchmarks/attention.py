"""Cost of attention per token against the context length: `mneme bench attention`.

One layer, forward and backward, one document, one thread, fp32: CPU time per token and the peak of
resident memory, each point in a process of its own with the same allocator settings. A point that
would take longer than `LIMIT_SECONDS`, judged by the one before it, is not run and named as such.
To add an attention, add it to `LAYERS`.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from launch.bench import Row
from train.model.attention.compressed import HybridAttention
from train.model.attention.config import CompressedConfig, IndexerConfig, MlaConfig
from train.model.attention.dsa import SparseLatentAttention
from train.model.attention.mla import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.tokens import Tokens

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
LIMIT_SECONDS = 180.0
REPEAT_SECONDS = 8.0
"""A point is repeated while it has taken less than this; the fastest run counts. The first one pays
for fresh memory, which doubled the time of the cheapest layers at 32K tokens."""
TOP_K = 512
DENSE = "dense MLA"
CONFIG = ModelConfig(
    hidden_size=256,
    num_attention_heads=4,
    mla=MlaConfig(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    indexer=IndexerConfig(num_heads=4, head_dim=32, top_k=TOP_K),
    # A key-value row as wide as the latent of MLA with its rotary key.
    compressed=CompressedConfig(
        compress_ratios=(0, 4, 128),
        hca_ratio=128,
        sliding_window=128,
        head_dim=96,
        rope_head_dim=32,
    ),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Otherwise glibc hands every large block back to the kernel, and page faults are what is timed.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=67108864",
}


def idle_indexer(layer: nn.Module) -> nn.Module:
    """Selects, but does not learn, as after pre-training."""
    layer.get_submodule("indexer").eval()
    return layer


def hybrid(ratio: int) -> HybridAttention:
    """The layer of V4 with this compression ratio."""
    return HybridAttention(CONFIG, CONFIG.compressed.compress_ratios.index(ratio))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    DENSE: lambda: MultiHeadLatentAttention(CONFIG),
    f"DSA top-{TOP_K}": lambda: SparseLatentAttention(CONFIG),
    f"DSA top-{TOP_K}, indexer not learning": lambda: idle_indexer(SparseLatentAttention(CONFIG)),
    f"CSA 4, top-{TOP_K}": lambda: hybrid(4),
    f"CSA 4, top-{TOP_K}, indexer not learning": lambda: idle_indexer(hybrid(4)),
    "HCA 128": lambda: hybrid(128),
    "window 128": lambda: hybrid(0),
}


def run() -> list[Row]:
    """Measure every layer at every length, then compare."""
    rows = []
    costs: dict[str, dict[int, float]] = {}
    for name in LAYERS:
        found, memory, skipped = measure_layer(name)
        costs[name] = found
        for length, cost in found.items():
            peer = costs[DENSE].get(length) if name != DENSE else None
            rows.append(
                Row(
                    case=f"{name}, {length} tokens" + (f" | {DENSE}" if peer else ""),
                    value=cost,
                    unit="us/token",
                    peer=peer,
                    ratio=cost / peer if peer else None,
                )
            )
        rows += [
            Row(case=f"{name}, {length} tokens: not run, would take", value=seconds, unit="s")
            for length, seconds in skipped.items()
        ]
        rows += memory_rows(name, memory)
        if name != DENSE:
            rows.append(crossover(name, found, costs[DENSE]))
    return rows


def measure_layer(name: str) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """By length: microseconds per token, peak MiB, and seconds that a point would have taken."""
    costs: dict[int, float] = {}
    memory: dict[int, float] = {}
    skipped: dict[int, float] = {}
    predicted = 0.0
    for length in LENGTHS:
        if predicted > LIMIT_SECONDS:
            skipped[length] = predicted
            predicted *= 4
            continue
        point = measure_apart(name, length)
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


def measure(name: str, length: int) -> dict[str, float]:
    """CPU seconds of a forward and backward pass, and its peak of memory above the start."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, length, CONFIG.hidden_size, requires_grad=True)
    positions = torch.arange(length)[None]
    documents = torch.zeros_like(positions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    while sum(times) < REPEAT_SECONDS:
        started = time.process_time()
        layer(x, Tokens.whole(documents, positions, documents)).sum().backward()
        times.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(times), "mebibytes": peak / 1024}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
