import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from launch.catalog import options
from launch.study import UNFAIR, run_study
from launch.study_config import load_study

STUDY = {
    "name": "memory",
    "description": "With and without memory",
    "question": "Does memory help?",
    "expectation": "A paper says so.",
    "scale_note": "This is tiny.",
    "recipe": "v4_nano",
    "arms": {"on": [], "off": ["model.engram=null"]},
    "hypotheses": [
        {"name": "helps", "statement": "memory lowers the loss", "arm": "on", "against": "off"},
        {
            "name": "low",
            "statement": "the loss with memory is below 3.2",
            "arm": "on",
            "metric": "validation/loss",
            "below": 3.2,
        },
    ],
    "budget_tokens": 20 * 16 * 256,
    "seeds": 2,
}


CLAIM = {"name": "helps", "statement": "it helps", "arm": "on", "against": "off"}


class Workshop:
    """A study file, a runs directory and the fake trainer."""

    def __init__(self, directory: Path) -> None:
        self.study = directory / "memory.yaml"
        self.study.write_text(yaml.safe_dump(STUDY, sort_keys=False))
        self.runs_dir = directory / "runs"
        self.directory = self.runs_dir / "study-memory"
        self.log = directory / "calls"
        self.directory.mkdir(parents=True)

    def run(self, *overrides: str, seeds: int | None = None) -> int:
        trainer = Path(__file__).with_name("fake_trainer.py")
        return run_study(
            str(self.study),
            seeds=seeds,
            runs_dir=self.runs_dir,
            overrides=overrides,
            command=[sys.executable, str(trainer), str(self.log)],
        )

    def calls(self) -> list[str]:
        """What the trainer was called for since the last time this was asked."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return calls


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return Workshop(tmp_path)


@pytest.mark.slow
def test_every_arm_trains_at_every_seed_and_the_report_decides(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    assert workshop.run() == 0
    trained = ["train on-seed0", "train off-seed0", "train on-seed1", "train off-seed1"]
    assert workshop.calls() == trained
    recipe = yaml.safe_load((workshop.directory / "off-seed1" / "recipe.yaml").read_text())
    assert (recipe["train"]["seed"], recipe["train"]["steps"]) == (1, 20)

    printed = capfd.readouterr().out
    assert re.findall(r"\[\d/\d\]", printed) == [f"[{n}/4]" for n in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert "[2/4] off, seed 0: held-out loss 3.1000, about 0 min left" in printed
    text = (workshop.directory / "report" / "report.md").read_text()
    # Unpaired, 0.105 would drown in the deviation of 0.36 between seeds.
    sentence = (
        "helps: memory lowers the loss: supported at this budget (on - off: validation/loss -0.105, "
        "95 % interval -0.1685 to -0.04147 over 2 seeds, p = 0.03)."
    )
    bound = (
        "low: the loss with memory is below 3.2: undecided at this budget (on: validation/loss is "
        "3 to 3.5, below 3.2 at 1 of 2 seeds)."
    )
    for line in (sentence, bound):
        assert line in text
        assert line in printed
    for line in (*(str(STUDY[key]) for key in ("question", "expectation", "scale_note")),):
        assert line in text
    assert "FAILED" not in text

    assert workshop.run() == 0
    assert workshop.calls() == []


def test_runs_on_other_data_void_every_verdict(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    (workshop.directory / "off-seed0.other-data").touch()
    assert workshop.run(seeds=1) == UNFAIR
    text = (workshop.directory / "report" / "report.md").read_text()
    assert (
        "FAILED: same batches in the same order in all arms: off differs from on at seed 0" in text
    )
    assert "lowers the loss: void, for a check has failed (" in text
    assert ": undecided" not in text
    assert "not fair" in capfd.readouterr().err


@pytest.mark.slow
def test_a_stop_ends_the_study_and_the_same_command_goes_on(workshop: Workshop) -> None:
    (workshop.directory / "off-seed0.exit").write_text("85")
    assert workshop.run(seeds=1) == 85
    assert workshop.calls() == ["train on-seed0", "train off-seed0"]
    assert not (workshop.directory / "report").exists()
    assert workshop.run(seeds=1) == 0
    assert workshop.calls() == ["resume off-seed0"]
    assert "undecided" in (workshop.directory / "report" / "report.md").read_text()


def test_a_failure_ends_the_study_with_its_code(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    (workshop.directory / "on-seed0.exit").write_text("3")
    assert workshop.run() == 3
    assert workshop.calls() == ["train on-seed0"]
    assert "on, seed 0: failed with exit code 3" in capfd.readouterr().err


def test_a_stop_request_reaches_the_training_process(workshop: Workshop) -> None:
    (workshop.directory / "on-seed0.signal").touch()
    before = signal.getsignal(signal.SIGTERM)
    assert workshop.run() == 85
    assert workshop.calls() == ["train on-seed0"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hiden_size=3"], r"on: model\.hiden_size=3: no such key.*\noff: "),
        (["train.seed=7"], r"train\.seed=7: a study sets the seeds itself"),
        (["train.steps=7"], r"train\.steps=7: a study computes the steps; change budget_tokens"),
        (["train.global_batch_size=48"], r"budget_tokens=81920: must be a multiple .*; use 86016"),
    ],
)
def test_a_wrong_override_fails_before_anything_runs(
    workshop: Workshop, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        workshop.run(*overrides)
    assert workshop.calls() == []


@pytest.mark.slow
def test_a_run_of_another_recipe_is_never_mixed_in(workshop: Workshop) -> None:
    assert workshop.run(seeds=1) == 0
    workshop.calls()
    problem = r"on-seed0: holds a run .*, this one has optim\.learning_rate=0\.1"
    with pytest.raises(ValueError, match=problem):
        workshop.run("optim.learning_rate=0.1", seeds=1)
    assert workshop.calls() == []


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"on": [], "off": ["train.dtype=fp32"]}, "on and off: the same recipe"),
        (
            {"on": [], "off": ["data.packing=best_fit"]},
            r"off: data\.packing=best_fit, not as in on: arms differ in the model .*, never in data",
        ),
        (
            {"on": [], "off": ["train.global_batch_size=32"]},
            r"off: train\.global_batch_size=32, not as in on",
        ),
    ],
)
def test_arms_have_to_differ_in_what_is_studied_and_in_nothing_else(
    workshop: Workshop, arms: dict[str, list[str]], message: str
) -> None:
    workshop.study.write_text(yaml.safe_dump(STUDY | {"arms": arms}, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        workshop.run()
    assert workshop.calls() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {True: [], False: []}}, "put it in quotes"),
        ({"arms": {"only": []}}, "arms"),
        ({"arms": {"../x": [], "y": []}}, r"\.\./x"),
        ({"seeds": 0}, "seeds"),
        ({"seed": 3}, "seed: Unexpected"),
        ({"name": "a/b"}, "name"),
        ({"budget_tokens": 0}, "budget_tokens"),
        (
            {"controls": {"more": {"base": "of", "match": "on"}}},
            r"controls\.more\.base=of: no such",
        ),
        ({"controls": {"more": {"base": "off", "match": "on"}}}, "varies nothing"),
        ({"controls": {"on": {"base": "off", "match": "on", "flops": "x"}}}, "is an arm too"),
        ({"hypotheses": []}, "hypotheses"),
        (
            {"hypotheses": [CLAIM | {"arm": "of"}]},
            r"hypotheses\.0\.arm=of: no such arm; use on, off",
        ),
        ({"hypotheses": [CLAIM | {"against": "on"}]}, "is the arm itself"),
        ({"hypotheses": [CLAIM | {"above": 1}]}, "compares with nothing or with two things"),
    ],
)
def test_a_wrong_study_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | change, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        load_study(str(path))


def test_an_unknown_study_names_near_ones() -> None:
    with pytest.raises(ValueError, match="engra: no such study; use engram"):
        load_study("engra")


@pytest.mark.parametrize("name", options("study"))
def test_packaged_studies_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_study(name).name == name
    # `false` stands for a trainer that fails at once: every arm has been composed by then.
    assert run_study(name, seeds=None, runs_dir=tmp_path, overrides=[], command=["false"]) == 1
