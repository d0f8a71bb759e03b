"""Corpora for `mneme bench data`: the same bytes for every reader."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.build import build_quickstart_corpus
from data.corpus import package_docstrings, standard_library
from data.shards import Sample, SampleMedium, write_split
from data.tokenizer import encode_texts

DOCUMENTS, CHARACTERS = 8000, 4000
IMAGES, PIXELS, QUALITY = 1500, 256, 85
PHOTOGRAPHS, PHOTOGRAPH_PIXELS = 200, 1200
MEDIA_TOKEN, VOCABULARY = 2, 4096


@dataclass(frozen=True)
class Corpora:
    """Where everything is."""

    tokenizer: Path
    text: Path
    """Source of DOCUMENTS texts of CHARACTERS characters each."""
    images: Path
    """Source of IMAGES pictures of PIXELS x PIXELS, JPEG, with a caption."""
    photographs: Path
    """The same of PHOTOGRAPHS of PHOTOGRAPH_PIXELS x PHOTOGRAPH_PIXELS."""
    indexed: Path
    """Prefix of the token ids of `text` as an IndexedDataset."""


def make(folder: Path) -> Corpora:
    """Write the corpora into a folder."""
    build_quickstart_corpus(folder / "quickstart", progress=False)
    tokenizer = folder / "quickstart" / "tokenizer.json"
    text = list(_texts(tokenizer))
    crops = list(_images(tokenizer, ("astronaut.png", "chelsea.png", "coffee.png"), IMAGES, PIXELS))
    photographs = list(_images(tokenizer, ("retina.jpg",), PHOTOGRAPHS, PHOTOGRAPH_PIXELS))
    sources = {"text": text, "images": crops, "photographs": photographs}
    for name, samples in sources.items():
        write_split(
            folder / name / "train",
            samples,
            source=name,
            split="train",
            tokenizer_sha256=sha256(tokenizer.read_bytes()).hexdigest(),
            vocab_size=VOCABULARY,
            media_token_id=None if name == "text" else MEDIA_TOKEN,
        )
    _write_indexed(folder / "indexed", text)
    return Corpora(tokenizer, *(folder / name for name in (*sources, "indexed")))


def _texts(tokenizer: Path) -> Iterator[Sample]:
    """Real text and code, cut to one length, again from the start where there is not enough."""
    sources = (standard_library(Counter()), package_docstrings(Counter()))
    whole = "\n".join(document.text for source in sources for document in source)
    starts = [(i * CHARACTERS) % (len(whole) - CHARACTERS) for i in range(DOCUMENTS)]
    parts = [whole[start : start + CHARACTERS] for start in starts]
    ids = encode_texts({"text": parts}, str(tokenizer))["tokens"]
    for number, (part, tokens) in enumerate(zip(parts, ids, strict=True)):
        yield Sample(
            key=f"text-{number:06d}",
            metadata={"number": number},
            text=part,
            tokens=np.array(tokens, np.uint32),
        )


def _images(tokenizer: Path, names: Sequence[str], number: int, pixels: int) -> Iterator[Sample]:
    """Crops of photographs that scikit-image ships."""
    folder = files("skimage") / "data"
    photographs = [
        Image.open(BytesIO((folder / name).read_bytes())).convert("RGB") for name in names
    ]
    chance = np.random.default_rng(0)
    for index in range(number):
        photograph = photographs[index % len(photographs)]
        left = int(chance.integers(photograph.width - pixels + 1))
        top = int(chance.integers(photograph.height - pixels + 1))
        encoded = BytesIO()
        crop = photograph.crop((left, top, left + pixels, top + pixels))
        crop.save(encoded, "JPEG", quality=QUALITY)
        medium = SampleMedium(
            extension="jpg", payload=encoded.getvalue(), kind="image", width=pixels, height=pixels
        )
        caption = f"crop {index}"
        (ids,) = encode_texts({"text": [caption]}, str(tokenizer))["tokens"]
        yield Sample(
            key=f"image-{index:06d}",
            metadata={"seq": [medium.part(0), {"t": caption}]},
            text=caption,
            tokens=np.array([MEDIA_TOKEN, *ids], np.uint32),
            media=(medium,),
        )


def _write_indexed(prefix: Path, samples: Sequence[Sample]) -> None:
    # Here, for megatron-core says much on import.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: PLC0415

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
