"""The index is what `tarfile` lists, and stock webdataset reads what it describes."""

import io
import json
import tarfile
import tempfile
import zlib
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.index import Medium, ShardIndex
from data.shards import Sample, SampleMedium, write_split
from data.tars import read_samples, split_name

MARKER = 2
# Unicode, long (PAX headers), with folders; no dots, as webdataset wants keys, and none that it takes
# for its own (__NAME__/).
_STEPS = st.text(
    st.characters(codec="utf-8", exclude_characters="/.\0", exclude_categories=["Cc", "Cs"]),
    min_size=1,
    max_size=120,
).filter(lambda step: not step.startswith("_"))
_KEYS = st.lists(_STEPS, min_size=1, max_size=3).map("/".join)
_PNG = io.BytesIO()
Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(_PNG, "PNG")

# Arguments, for beartype's checks of the objects themselves use `random`, which hypothesis forbids.
_MEDIA = st.one_of(
    st.fixed_dictionaries(
        {
            "extension": st.sampled_from(["jpg", "png"]),
            "payload": st.just(_PNG.getvalue()),
            "kind": st.just("image"),
            "width": st.integers(1, 2**31),
            "height": st.integers(1, 9000),
        }
    ),
    st.fixed_dictionaries(
        {
            "extension": st.sampled_from(["mp4", "webm"]),
            "payload": st.binary(max_size=2000),
            "kind": st.just("video"),
            "width": st.integers(1, 9000),
            "height": st.integers(1, 9000),
            "frames": st.integers(1, 2**31),
            "fps": st.floats(0.5, 120, width=32),
            "first_frame": st.integers(0, 2**31),
        }
    ),
)
# Token ids and media in order: with more than ten media m10 sorts before m2.
_CONTENTS = st.lists(st.integers(3, 60_000) | _MEDIA, max_size=24)
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=200)


def sample_of(key: str, contents: list[Any], text: str) -> Sample:
    media = tuple(SampleMedium(**item) for item in contents if isinstance(item, dict))
    parts = [{"t": "x"}, *(medium.part(number) for number, medium in enumerate(media))]
    return Sample(
        key=key,
        metadata={"seq": parts, "title": text[::-1]},
        text=text,
        tokens=np.array([i if isinstance(i, int) else MARKER for i in [*contents, 0]], np.uint16),
        media=media,
    )


def expected_media(sample: Sample, first: int, names: list[str]) -> list[Medium]:
    places = np.flatnonzero(sample.tokens == MARKER).tolist()
    return [
        Medium(
            member=first + names.index(f"{sample.key}.m{number}.{m.extension}"),
            place=places[number],
            kind=m.kind,
            width=m.width,
            height=m.height,
            frames=m.frames,
            fps=m.fps,
            first_frame=m.first_frame,
        )
        for number, m in enumerate(sample.media)
    ]


# webdataset does not close the shards that it reads.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@settings(deadline=None, max_examples=40)
@given(drawn=st.dictionaries(_KEYS, st.tuples(_CONTENTS, _TEXTS), min_size=1, max_size=5))
def test_shards_are_what_tarfile_and_webdataset_read(
    drawn: dict[str, tuple[list[Any], str]],
) -> None:
    samples = [sample_of(key, *content) for key, content in drawn.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "all"
        manifest = write_split(
            folder,
            samples,
            source="s",
            split="all",
            tokenizer_sha256="",
            vocab_size=2**16,
            media_token_id=MARKER,
        )
        [tar] = [folder / shard.name for shard in manifest.shards]
        index, raw = ShardIndex.open(tar), tar.read_bytes()
        with tarfile.open(tar) as archive:
            infos = archive.getmembers()
        assert [
            (index.member_name(i), index.offset[i], index.size[i], index.crc32[i])
            for i in range(len(index.offset))
        ] == [
            (i.name, i.offset_data, i.size, zlib.crc32(raw[i.offset_data : i.offset_data + i.size]))
            for i in infos
        ]
        for number, sample in enumerate(samples):
            members = index.members(number)
            names = [index.member_name(member) for member in members]
            extensions = index.extensions(members.start, members.stop)
            assert extensions == [split_name(name)[1] for name in names]
            assert index.key(number) == sample.key
            assert names == sorted(names, key=lambda name: split_name(name)[1])
            assert split_name(names[0])[1] == "json"
            assert {split_name(member)[0] for member in names} == {sample.key}
            assert index.media(number) == expected_media(sample, members.start, names)
            start = int(index.token_offset[number])
            stored = np.frombuffer(raw, "<u2", int(index.num_tokens[number]), start)
            np.testing.assert_array_equal(stored, sample.tokens)
        check_with_webdataset(tar, samples)


def check_with_webdataset(tar: Path, samples: list[Sample]) -> None:
    stock = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    read = list(stock)
    assert [row["__key__"] for row in read] == [sample.key for sample in samples]
    for row, sample in zip(read, samples, strict=True):
        assert json.loads(row["json"]) == {"source": "s", **sample.metadata}
        assert row.get("txt", b"").decode() == sample.text
        assert row["u16"] == sample.tokens.tobytes()
        for number, medium in enumerate(sample.media):
            assert row[f"m{number}.{medium.extension}"] == medium.payload


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_stock_webdataset_decodes_the_images(tmp_path: Path) -> None:
    medium = SampleMedium(extension="png", payload=_PNG.getvalue(), kind="image", width=3, height=2)
    sample = Sample(
        key="a/b",
        metadata={"seq": [medium.part(0), {"t": "text"}]},
        text="text",
        tokens=np.array([MARKER, 5, 0], np.uint16),
        media=(medium,),
    )
    [shard] = write_split(
        tmp_path / "all",
        [sample],
        source="s",
        split="all",
        tokenizer_sha256="",
        vocab_size=9,
        media_token_id=MARKER,
    ).shards
    url = str(tmp_path / "all" / shard.name)
    [row] = webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode("pil")
    assert [name for name in row if name[0] != "_"] == ["json", "m0.png", "txt", "u16"]
    np.testing.assert_array_equal(
        np.asarray(row["m0.png"]), np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    )
    assert row["json"]["seq"] == [{"img": "m0.png", "w": 3, "h": 2}, {"t": "text"}]
    assert row["txt"] == "text"


@settings(deadline=None, max_examples=60)
@given(
    members=st.lists(
        st.tuples(_KEYS, st.sampled_from(["txt", "jpg", "0.jpg"]), st.binary(max_size=1200)),
        min_size=1,
        max_size=12,
    ),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    folders=st.booleans(),
)
def test_any_tar_is_read_as_tarfile_reads_it(
    members: list[tuple[str, str, bytes]], form: int, folders: bool
) -> None:
    """Grouped as itertools does, whatever the order of the members."""
    with tempfile.TemporaryDirectory() as name:
        tar = Path(name) / "x.tar"
        with tarfile.open(tar, "w", format=form) as archive:
            for key, extension, payload in members:
                if folders:
                    folder = tarfile.TarInfo("folder")
                    folder.type = tarfile.DIRTYPE
                    archive.addfile(folder)
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
        with tarfile.open(tar) as archive:
            infos = [info for info in archive if info.isreg()]
        ignored: Counter[str] = Counter()
        samples = list(read_samples(tar, ignored))
        assert ignored["folder"] == folders * len(members)
        read = [member for sample in samples for member in sample]
        assert [(m.name, m.offset) for m in read] == [(i.name, i.offset_data) for i in infos]
        assert [m.payload for m in read] == [payload for _, _, payload in members]
        keys = [key for key, _ in groupby(members, key=lambda member: member[0])]
        assert [sample[0].key for sample in samples] == keys
