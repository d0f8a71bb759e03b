"""Speed of the data path: `mneme bench data`.

Every reader reads the same bytes, already in memory of the operating system, in turns; the median
over the rounds counts. Ours goes through the documents in a random order and checks every byte; stock
webdataset and Hugging Face stream the shards in their order; megatron-core's IndexedDataset, which has
no checksums, is read at random as well. One thread each.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg

from data.config import DataConfig, ImageConfig, SourceConfig
from data.loader import Batch, build_loader
from data.order import permute, round_keys
from data.pictures import PictureDocuments, VisionGeometry
from data.reader import SplitReader
from launch.bench import Row
from launch.compose import compose
from launch.corpus import corpus_problems
from tests.benchmarks.of_data.corpora import (
    DOCUMENTS,
    IMAGES,
    MEDIA_TOKEN,
    PHOTOGRAPH_PIXELS,
    PHOTOGRAPHS,
    PIXELS,
    Corpora,
    make,
)

ROUNDS = 5
SEQUENCE_LENGTH, BATCH, BATCHES = 4096, 8, 60
GEOMETRY = VisionGeometry(
    placeholder_token_id=MEDIA_TOKEN, patch_size=16, frames_per_patch=1, spatial_merge=2
)
RECIPES = ("v4_nano", "v4_nano_mm")
TRAINED_STEPS, WARM_UP = 25, 5

Reader = Callable[[], object]


def run() -> list[Row]:
    """All of it: readers side by side, resuming, and what the trainer waits.

    Raises:
        ValueError: a corpus that the nano recipes train on is not there.
    """
    if problems := [p for recipe in RECIPES for p in corpus_problems(compose(recipe).config)]:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    with tempfile.TemporaryDirectory() as folder:
        corpora = make(Path(folder))
        rows = [
            *text(corpora),
            *tokens(corpora),
            *batches(corpora),
            *images(corpora),
            *resume(corpora),
        ]
    return [*rows, *waiting()]


def rates(readers: dict[str, tuple[Reader, int]]) -> dict[str, float]:
    """Items per second of each reader, given how many it reads; taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for round_number in range(ROUNDS + 1):
        for name, (read, _) in readers.items():
            started = time.perf_counter()
            read()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    found = {name: readers[name][1] / statistics.median(times) for name, times in seconds.items()}
    print(found, file=sys.stderr, flush=True)
    return found


def consume(items: Iterable[object]) -> int:
    """Take all items and keep none; returns how many there were."""
    return sum(1 for _ in items)


def order(size: int) -> list[int]:
    """A random order, made beforehand."""
    return [permute(position, size, round_keys(0, "bench", 0)) for position in range(size)]


def text(corpora: Corpora) -> list[Row]:
    """Whole samples: all members as bytes."""
    import datasets  # noqa: PLC0415 - slow to import
    import webdataset  # noqa: PLC0415 - slow to import

    urls = sorted(str(path) for path in (corpora.text / "train").glob("*.tar"))
    reader, documents = SplitReader(corpora.text, source="text", split="train"), order(DOCUMENTS)

    def stock() -> int:
        return consume(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))

    def hugging_face() -> int:
        stream = datasets.load_dataset("webdataset", data_files=urls, split="train", streaming=True)
        return consume(stream)

    found = rates(
        {
            "Mneme": (lambda: consume(map(reader.sample, documents)), DOCUMENTS),
            "webdataset": (stock, DOCUMENTS),
            "Hugging Face streaming": (hugging_face, DOCUMENTS),
        }
    )
    return [
        row("text, whole samples", "samples/s", found, "webdataset", target=10.0),
        row("text, whole samples", "samples/s", found, "Hugging Face streaming"),
    ]


def tokens(corpora: Corpora) -> list[Row]:
    """Token ids of single documents, each copied to where a batch would have it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: PLC0415 - talks

    reader, documents = SplitReader(corpora.text, source="text", split="train"), order(DOCUMENTS)
    indexed = IndexedDataset(str(corpora.indexed))
    batch = np.empty(SEQUENCE_LENGTH, np.int64)

    def copied(read: Callable[[int], np.ndarray]) -> Reader:
        def read_all() -> None:
            for document in documents:
                found = read(document)
                batch[: len(found)] = found

        return read_all

    found = rates(
        {
            "Mneme": (copied(reader.stored_tokens), DOCUMENTS),
            "IndexedDataset": (copied(indexed.get), DOCUMENTS),
        }
    )
    return [row("token ids of a document", "documents/s", found, "IndexedDataset", target=1 / 1.5)]


def batches(corpora: Corpora) -> list[Row]:
    """Packed batches, from our shards and from the same tokens in an IndexedDataset."""
    number = BATCHES * BATCH * SEQUENCE_LENGTH

    def of(path: Path) -> Reader:
        config = _config(corpora, path)
        return lambda: consume(itertools.islice(_loader(config), BATCHES))

    found = rates(
        {"Mneme": (of(corpora.text), number), "IndexedDataset": (of(corpora.indexed), number)}
    )
    return [row("packed batches, by our loader", "tokens/s", found, "IndexedDataset")]


def images(corpora: Corpora) -> list[Row]:
    """JPEG to patches, beside nothing but a decoder with the bytes at hand: Pillow, and the one we use."""
    small, large = f"{PIXELS} x {PIXELS}", f"{PHOTOGRAPH_PIXELS} x {PHOTOGRAPH_PIXELS}"
    return [
        *decoding(small, corpora.images, IMAGES),
        *decoding(f"{large}, made smaller", corpora.photographs, PHOTOGRAPHS),
    ]


def decoding(case: str, path: Path, number: int) -> list[Row]:
    """One source of images."""
    reader = SplitReader(path, source="images", split="train")
    documents = PictureDocuments(reader, GEOMETRY, ImageConfig(max_rows=64))
    payloads = [reader.payload(d, reader.media(d)[0].member) for d in order(number)]

    def decode() -> None:
        for payload in payloads:
            np.asarray(Image.open(BytesIO(payload)).convert("RGB"))

    def decode_by_ours() -> None:
        for payload in payloads:
            decode_jpeg(payload, fastdct=False, fastupsample=False)

    found = rates(
        {
            "Mneme": (lambda: consume(map(documents.read, order(number))), number),
            "bare decoding": (decode, number),
            "bare decoding by simplejpeg": (decode_by_ours, number),
        }
    )
    name = f"JPEG to patches, {case}"
    return [
        row(name, "images/s", found, "bare decoding", target=0.95),
        row(name, "images/s", found, "bare decoding by simplejpeg"),
    ]


def resume(corpora: Corpora) -> list[Row]:
    """From a saved position to the first batch, early and late in a run."""
    config = _config(corpora, corpora.text, num_lanes=1024)
    rows = []
    for name, later in (("early", 0), ("after 10^12 tokens", 10**12)):
        _, state = next(_loader(config, lanes=1024))
        state = _moved(state, later)
        started = time.perf_counter()
        next(_loader(config, lanes=1024, state=state))
        seconds = time.perf_counter() - started
        size = sum(map(len, state.values()))
        case = f"resume 1,024 lanes, {name}, state of {size} bytes"
        rows.append(Row(case=case, value=seconds, unit="s", target=1.0, met=seconds < 1))
    return rows


def _moved(state: dict[str, str], tokens: int) -> dict[str, str]:
    """The position of a run that has trained on so many tokens more."""
    if not tokens:
        return state
    draws = tokens // 1024 // 1100
    moved = {}
    for key, value in state.items():
        content = json.loads(value)
        if key.startswith("lane/"):
            content[2] = [cursor + draws for cursor in content[2]]
        moved[key] = json.dumps(content, separators=(",", ":"))
    return moved


def waiting() -> list[Row]:
    """Share of a step in which the trainer waits for its batch."""
    rows = []
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            overrides = [f"train.steps={TRAINED_STEPS}", "evaluate.every_steps=0"]
            overrides += ["monitor.wandb=false", "monitor.tensorboard=false"]
            subprocess.run(
                [
                    *(sys.executable, "-m", "launch.cli", "train", recipe, *overrides),
                    *("--run-dir", str(run_dir)),
                ],
                check=True,
                stdout=sys.stderr,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
        shares = [r["data_wait_seconds"] / r["step_seconds"] for r in map(json.loads, lines)]
        share = statistics.median(shares)
        case = f"{recipe}: share of a step that waits for data"
        rows.append(Row(case=case, value=share, unit="", target=0.02, met=share < 0.02))
    return rows


def row(
    case: str, unit: str, found: dict[str, float], peer: str, target: float | None = None
) -> Row:
    """Ours beside a peer; the target is a ratio."""
    ratio = found["Mneme"] / found[peer]
    return Row(
        case=f"{case}, against {peer} (ratio)",
        value=found["Mneme"],
        unit=unit,
        peer=found[peer],
        ratio=ratio,
        target=target,
        met=None if target is None else ratio >= target,
    )


def _config(corpora: Corpora, path: Path, num_lanes: int = BATCH) -> DataConfig:
    return DataConfig(
        sources={"text": SourceConfig(path=str(path))},
        tokenizer=str(corpora.tokenizer),
        sequence_length=SEQUENCE_LENGTH,
        num_lanes=num_lanes,
        prefetch_batches=0,
    )


def _loader(
    config: DataConfig, lanes: int = BATCH, state: dict[str, str] | None = None
) -> Iterator[tuple[Batch, dict[str, str]]]:
    return build_loader(
        config,
        split="train",
        seed=0,
        global_batch_size=lanes,
        data_rank=0,
        data_size=1,
        state=state,
    )
