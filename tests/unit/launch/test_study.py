import re
import signal
import sys
from math import gamma, pi, sqrt
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.catalog import options
from launch.study import load_study, run_study
from launch.study_report import Difference, arm_curve, paired_difference, verdict

STUDY = {
    "name": "memory",
    "description": "With and without memory",
    "question": "Does memory help?",
    "recipe": "v4_nano",
    "overrides": ["train.steps=20"],
    "arms": {"on": [], "off": ["model.engram=null"]},
    "seeds": 2,
}


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


def test_every_arm_trains_at_every_seed_and_the_report_compares_them_in_pairs(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    assert workshop.run() == 0
    trained = ["train on-seed0", "train off-seed0", "train on-seed1", "train off-seed1"]
    assert workshop.calls() == trained
    recipe = yaml.safe_load((workshop.directory / "off-seed1" / "recipe.yaml").read_text())
    assert (recipe["train"]["seed"], recipe["train"]["steps"]) == (1, 20)

    printed = capfd.readouterr().out
    assert re.findall(r"\[\d/\d\]", printed) == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    text = (workshop.directory / "report" / "report.md").read_text()
    assert "| on |  | 2 | 20 | 3.2500 +- 0.3536 | 3.2500 +- 0.3536 |" in text
    assert "| off | model.engram=null | 2 | 20 | 3.3550 +- 0.3606 |" in text
    # Unpaired, 0.105 would drown in the deviation of 0.36 between seeds.
    sentence = (
        "off - on: held-out loss +0.1050 (standard error 0.0050 over 2 paired seeds, "
        "95 % interval +0.0415 to +0.1685): on is better."
    )
    assert sentence in text
    assert sentence in printed
    assert "Does memory help?" in text

    assert workshop.run() == 0
    assert workshop.calls() == []


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
        (["train.seed=7"], r"on: train\.seed=7: a study sets the seeds itself"),
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
    with pytest.raises(ValueError, match=r"on-seed0: holds a run .*, this one has train\.steps=30"):
        workshop.run("train.steps=30", seeds=1)
    assert workshop.calls() == []


def test_arms_that_are_the_same_recipe_are_refused(workshop: Workshop) -> None:
    workshop.study.write_text(yaml.safe_dump(STUDY | {"arms": {"a": [], "b": ["train.steps=20"]}}))
    with pytest.raises(ValueError, match="a and b: the same recipe"):
        workshop.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {True: [], False: []}}, "put it in quotes"),
        ({"arms": {"only": []}}, "arms"),
        ({"arms": {"../x": [], "y": []}}, r"\.\./x"),
        ({"seeds": 0}, "seeds"),
        ({"seed": 3}, "seed: Unexpected"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_a_wrong_study_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | change))
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


def test_intervals_are_those_of_student() -> None:
    """Numerical integration of Student's density over the interval gives 95 %."""
    for num_seeds in range(2, 12):
        difference = Difference(mean=0.0, standard_error=1.0, num_seeds=num_seeds)
        assert difference.half_width is not None
        freedom = num_seeds - 1
        scale = gamma((freedom + 1) / 2) / (gamma(freedom / 2) * sqrt(freedom * pi))
        x = np.linspace(-difference.half_width, difference.half_width, 100_001)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=5e-5)  # three decimals


def test_the_standard_error_is_that_of_the_paired_differences() -> None:
    difference = paired_difference([1.0, 2.0, 4.0], [0.5, 2.0, 3.0])
    gaps = np.array([0.5, 0.0, 1.0])
    assert difference.mean == pytest.approx(gaps.mean())
    assert difference.standard_error == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))


def test_verdicts_claim_no_more_than_the_seeds_show() -> None:
    def say(mean: float, error: float | None, seeds: int) -> str:
        difference = Difference(mean=mean, standard_error=error, num_seeds=seeds)
        return verdict("b", "a", "training", difference)

    assert "undecided" in say(-5.0, None, 1)
    # Three standard errors: not enough for 2 seeds, enough for 10.
    assert "undecided" in say(-0.3, 0.1, 2)
    assert say(-0.3, 0.1, 10).endswith("b is better.")
    assert say(0.3, 0.1, 10).endswith("a is better.")
    assert "undecided" in say(0.19, 0.1, 1000)


def test_a_band_spans_the_seeds_as_far_as_all_of_them_go() -> None:
    short = [{"tokens": t, "loss_main": 1.0} for t in (8, 16)]
    long = [{"tokens": t, "loss_main": 3.0} for t in (8, 16, 24)]
    curve = arm_curve("x", [long, short])
    assert (curve.tokens, curve.loss) == ([8, 16], [2.0, 2.0])
    assert (curve.low, curve.high) == ([1.0, 1.0], [3.0, 3.0])
