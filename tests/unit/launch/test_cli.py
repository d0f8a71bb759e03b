import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.compose import compose
from train.recipe import from_plain

ROOT = Path(__file__).parents[3]


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as leave:
        code = int(leave.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_list_names_recipes_and_studies(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "list")
    assert code == 0
    assert "  v4_nano          The V4 stack at toy size" in out
    code, out, _ = say(capsys, "list", "--json")
    answer = json.loads(out)
    assert {"name", "description"} == set(answer["recipes"][0])
    assert "engram" in [study["name"] for study in answer["studies"]]


def test_show_prints_what_ranks_would_read(capsys: pytest.CaptureFixture[str]) -> None:
    expected = compose("v4_nano", ["train.steps=30", "model.engram=null"]).config
    words = ["show", "train.steps=30", "--json", "model.engram=null"]
    code, out, _ = say(capsys, *words[:1], "v4_nano", *words[1:])
    assert (code, from_plain(json.loads(out))) == (0, expected)
    code, out, _ = say(capsys, "show", "v4_nano", "train.steps=30", "model.engram=null")
    assert (code, from_plain(yaml.safe_load(out))) == (0, expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trian v4_nano", "mneme trian: no such command; use train"),
        ("xyz", "mneme xyz: no such command; use list, show, train"),
        ("plan v4_nano", "mneme plan: not available yet; there is list, show, train"),
        ("data build other", "nothing: give one input, of --text"),
        ("show v4_nan", "v4_nan: no such recipe; nearest: v4_nano"),
        ("show v4_nano train.stepz=1 a=2", "train.stepz=1: no such key; nearest: train.steps"),
        ("show v4_nano --jsn", "unrecognized: --jsn; see mneme --help"),
        ("show", "mneme show: the following arguments are required: RECIPE"),
        ("train v4_nano --nproc x", "argument --nproc: invalid int value: 'x'"),
        ("train v4_nano --nproc 3", "but --nproc 3; use --nproc 4"),
        ("resume nowhere", "nowhere: holds no run (no recipe.yaml)"),
        ("status nowhere", "nowhere: holds no run (no recipe.yaml)"),
        ("logs nowhere", "nowhere: holds no run (no recipe.yaml)"),
        ("bench clii", "bench clii: no such benchmark; use cli"),
        ("report nowhere", "nowhere"),
        ("ablate engrma", "engram"),
        ("dash nowhere", "nowhere"),
        ("list v4_nano", "unrecognized: v4_nano"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_input_is_2_and_a_message(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    code, out, err = say(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_help_lists_every_command_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "--help")
    assert code == 0
    for command in ("list", "train", "resume", "ablate", "not available yet", "doctor"):
        assert command in out
    code, out, _ = say(capsys, "train", "--help")
    assert (code, "--run-dir" in out) == (0, True)


def test_quick_commands_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom launch.cli import main\n"
        "main(['list']); main(['show', 'v4_nano']); main(['status', 'nowhere'])\n"
        "main(['train', 'v4_nano', 'train.steps=0'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_list_composes_nothing() -> None:
    code = (
        "import sys\nfrom launch.cli import main\nmain(['list'])\n"
        "sys.exit(bool({'torch', 'hydra', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m launch.cli show v4_nano | true"
    result = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
