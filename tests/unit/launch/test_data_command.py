"""`mneme data`: what is typed reaches the builds, and all that is wrong is said at once."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import webdataset

import data.build
import data.build_mm
import data.corpus
import data.pictures_corpus
from data.build import read_summary
from launch.cli import main
from tests.unit.data.imports import WORDS, files, samples, tokenizer_file


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(30):
        Path(f"in/{i:02d}.txt").write_text(" ".join(WORDS[i % 12 :] * 3) + f" {i}")
    Path("in/rows.jsonl").write_text(
        "".join(json.dumps({"body": " ".join(WORDS), "name": f"n{i}"}) + "\n" for i in range(30))
    )


def say(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    try:
        code = main(line.split())
    except SystemExit as leave:
        code = int(leave.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_sources_are_added_and_converted(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data build c --source words --text in --extensions txt --vocab-size 270 --held-out 0.3"
    code, out, _ = say(capsys, f"{line} --processes 1")
    assert code == 0
    assert "data.sources.words.path=c/words and data.tokenizer=c/tokenizer.json" in out
    line = (
        "data build c --source rows --jsonl in/*.jsonl --text-key body --id-key name --held-out 0"
    )
    code, out, _ = say(capsys, f"{line} --limit 20")
    assert (code, out.splitlines()[0][:23]) == (0, "rows/all: 20 documents,")
    assert [(s.source, s.split) for s in read_summary(Path("c")).splits] == [
        ("words", "train"),
        ("words", "validation"),
        ("rows", "all"),
    ]
    code, out, _ = say(capsys, "data convert c/rows out/rows --to megatron --split all")
    assert (code, out) == (0, "20 documents: out/rows\n")
    code, out, _ = say(
        capsys, "data convert out/rows back --to webdataset --tokenizer c/tokenizer.json"
    )
    assert (code, out) == (0, "20 documents: back\n")
    before, after = samples(Path("c/rows")), samples(Path("back"))
    assert [s["u16"] for s in before.values()] == [s["u16"] for s in after.values()]


def test_everything_that_is_wrong_is_said_before_work_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine").mkdir()
    Path("mine/file").touch()
    Path("bad.json").write_text("{}")
    before = files(Path())
    line = "data build mine --text nowhere --jsonl in/*.json --source a/b --image-root gone"
    line += (
        " --held-out 1 --limit 0 --processes 0 --clip-seconds 0 --vocab-size 9 --tokenizer bad.json"
    )
    code, out, err = say(capsys, f"{line} -o x")
    assert (code, out) == (2, "")
    for problem in (
        "--text and --jsonl: give one input, of --text, --images",
        "--source=a/b: use letters, digits, - and _ only",
        "--text=nowhere: no such folder",
        "--jsonl=in/*.json: no such files; quote the pattern",
        "--image-root: is for --obelics, --mmc4; leave it out",
        "--image-root=gone: no such folder",
        "--clip-seconds: is for --videos; leave it out",
        "--held-out=1.0: a share from 0 to below 1",
        "--limit=0: must be 1 or more",
        "--processes=0: must be 1 or more",
        "--clip-seconds=0.0: must be above 0",
        "--tokenizer and --vocab-size: one of both",
        "--vocab-size=9: use 259 or more",
        "--tokenizer=bad.json: not a file of `tokenizers`",
        "--output: is for quickstart; the corpus goes to DEST",
    ):
        assert problem in err
    assert files(Path()) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data build c", "nothing: give one input, of --text"),
        ("data build c --text in", "--source: needed; give the source a name"),
        ("data build c --text in --source a", "--tokenizer: a new corpus needs one"),
        (
            "data build mine --text in --source a --vocab-size 300",
            "mine: exists and is not a corpus",
        ),
        ("data build c --mmc4 in/rows.jsonl --source a", "--image-root: needed for --mmc4"),
        ("data build quickstart --text in", "--source: needed"),
        (
            "data build c --images in --source a --tokenizer no.json",
            "no special token for the place",
        ),
        ("data convert c d --to megatron --tokenizer x", "--tokenizer: is for --to webdataset"),
        ("data convert c d --to webdataset --split all", "--split: is for --to megatron"),
        ("data convert c d --to webdataset", "--tokenizer: needed for --to webdataset"),
        ("data convert in/x d --to megatron", "there is no"),
        ("data convert c d", "the following arguments are required: --to"),
        ("data stats nowhere", "has no manifest.json"),
        ("data verify nowhere", "has no manifest.json"),
        ("data stats c --sample 3", "--sample: is of a step; add --step T"),
        ("data stats c --step 3", "c: holds no run (no recipe.yaml); --step is of a run"),
        ("data index in", "the following arguments are required: --tokenizer"),
        ("data index in --tokenizer no.json", "in: "),
        ("data build c --jsno x", "unrecognized: --jsno"),
    ],
)
def test_wrong_input_ends_with_code_2(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/file").touch()
    text = tokenizer_file(Path()).read_text()
    Path("no.json").write_text(text.replace("<|reserved|>", "<|other|>"))
    code, _, err = say(capsys, line)
    assert (code, "Traceback" in err) == (2, False)
    assert said in err


def test_help_names_every_input(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "data build --help")
    assert code == 0
    for name in ("text", "jsonl", "parquet", "hf", "images", "videos", "obelics", "mmc4"):
        assert f"--{name} " in out
    code, out, _ = say(capsys, "data --help")
    assert (code, "convert" in out) == (0, True)


def test_the_command_line_starts_without_heavy_imports() -> None:
    code = "import sys, launch.cli; print([n for n in ('torch', 'datasets', 'numpy') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n"


def test_verify_and_stats_of_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data build c --source words --text in --extensions txt --vocab-size 270 --held-out 0.3"
    assert say(capsys, line)[0] == 0
    code, out, _ = say(capsys, "data verify c --json")
    assert (code, json.loads(out)) == (0, {"ok": True, "problems": []})
    code, out, _ = say(capsys, "data stats c/words --json")
    assert (code, json.loads(out)["splits"][-1]["documents"]) == (0, 30)
    code, out, _ = say(capsys, "data stats c")
    assert (code, "words" in out) == (0, True)
    tar = Path("c/words/train/shard-000000.tar")
    raw = bytearray(tar.read_bytes())
    raw[1100] ^= 1
    tar.write_bytes(raw)
    code, out, _ = say(capsys, "data verify c --json")
    answer = json.loads(out)
    assert (code, answer["ok"]) == (1, False)
    assert answer["problems"][0]["shard"] == "shard-000000.tar"
    assert say(capsys, "data verify c")[0] == 1
    tar.write_bytes(raw[:-512])
    code, _, err = say(capsys, "data stats c")
    assert (code, "mneme data verify c names all of it" in err) == (1, True)


def test_shards_of_others_are_indexed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs").mkdir()
    with webdataset.TarWriter("theirs/a.tar") as writer:
        for i in range(3):
            writer.write({"__key__": f"s{i}", "txt": " ".join(WORDS)})
    tokenizer = tokenizer_file(Path())
    code, out, _ = say(capsys, f"data index theirs --tokenizer {tokenizer} --source other")
    assert (code, out.splitlines()[0][:26]) == (0, "source other: 3 documents,")
    tar = Path("theirs/a.tar")
    tar.write_bytes(tar.read_bytes()[:1500])
    code, _, err = say(capsys, f"data index theirs --tokenizer {tokenizer}")
    assert (code, "restore these from a copy" in err) == (1, True)


@pytest.mark.slow
def test_pictures_are_added_to_the_quickstart_corpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("CROPS", 8), ("CLIPS", 4), ("ILLUSTRATED", 30)):
        monkeypatch.setattr(data.pictures_corpus, f"NUM_{name}", number)
    for module, name in (
        (data.build, "standard_library"),
        (data.build, "package_docstrings"),
        (data.build_mm, "package_docstrings"),
    ):
        whole = getattr(data.corpus, name)
        monkeypatch.setattr(module, name, lambda skipped, whole=whole: islice(whole(skipped), 90))
    code, out, _ = say(capsys, "data build quickstart_mm -o c")
    assert (code, out) == (0, "corpus: c; next: mneme train v4_nano_mm\n")
    before = files(Path("c"))
    assert {s.source for s in read_summary(Path("c")).splits} == {"code", "docs", "pictures"}
    assert say(capsys, "data verify c --decode")[0] == 0
    assert say(capsys, "data build quickstart_mm -o c")[0] == 0
    assert say(capsys, "data build quickstart -o c")[0] == 0
    assert files(Path("c")) == before


def test_needles_want_a_corpus_to_hide_in(
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, problem = say(capsys, "data build niah -o c")
    assert (code, problem) == (2, "c: no corpus there; make it with: mneme data build quickstart\n")
    Path("c").symlink_to(tiny_corpus)
    code, _, problem = say(capsys, "data build niah -o c")
    assert code == 2
    assert "words of one token" in problem
    assert not (tiny_corpus / "niah").exists()
