"""The corpus of pictures that installed packages ship."""

import json
from collections import Counter
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data import pictures_corpus
from data.config import ImageConfig
from data.corpus import package_docstrings
from data.pictures import PictureDocuments, VisionGeometry
from data.pictures_corpus import add_pictures, build_pictures
from data.reader import SplitReader

VISION = VisionGeometry(placeholder_token_id=2, patch_size=16, frames_per_patch=1, spatial_merge=2)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_corpus, "NUM_CROPS", 24)
    monkeypatch.setattr(pictures_corpus, "NUM_CLIPS", 4)
    monkeypatch.setattr(pictures_corpus, "NUM_ILLUSTRATED", 8)


# webdataset does not close the shards that it reads.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_documents_are_real_pictures_and_the_same_every_time(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    texts = list(islice(package_docstrings(Counter()), 40))
    tokenizer = tiny_corpus / "tokenizer.json"
    for name in ("once", "again"):
        build_pictures(
            tmp_path / name / "pictures", texts, tokenizer, vocab_size=512, progress=False
        )
    tars = [sorted((tmp_path / name).rglob("*.tar")) for name in ("once", "again")]
    assert [tar.read_bytes() for tar in tars[0]] == [tar.read_bytes() for tar in tars[1]]

    reader = SplitReader(tmp_path / "once/pictures", source="pictures", split="train")
    documents = PictureDocuments(reader, VISION, ImageConfig(max_rows=32, max_frames=8))
    contents = [documents.read(number) for number in range(len(documents))]
    kinds = Counter(reader.place(n)[1].partition("/")[0] for n in range(len(documents)))
    assert kinds.keys() == {"crop", "clip", "illustrated"}
    pictures = [picture for content in contents for picture in content.pictures]
    assert min(len(content.pictures) for content in contents) >= 1
    assert np.mean([picture.patches.std() > 5 for picture in pictures]) > 0.9  # not blank

    samples = list(webdataset.WebDataset(str(tars[0][0]), shardshuffle=False))
    assert len(samples) == len(documents)
    for sample in samples:
        fields = json.loads(sample["json"])
        text = "".join(part.get("t", "") for part in fields["seq"])
        assert text == sample["txt"].decode()
        assert fields["captions"] == "synthetic"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(name: str) -> object:
        return None if name in ("skvideo", "av") else find_spec(name)

    monkeypatch.setattr(pictures_corpus, "find_spec", found)
    with pytest.raises(
        ValueError, match=r"quickstart_mm: .* scikit-video, av, .*pip install scikit-video av$"
    ):
        add_pictures(tmp_path, progress=False)
