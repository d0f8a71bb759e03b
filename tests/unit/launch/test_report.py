import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from launch.report import write_report
from tests.chromium import chromium_page
from train.events import append_event
from train.expert_load import encode

RECIPE: dict[str, object] = {
    "name": "tiny",
    "model": {"residual": "mhc", "engram": {"layers": [1], "num_heads": 4}},
    "train": {"steps": 60, "seed": 0},
}


def write_run(run_dir: Path, recipe: dict[str, object], loss: float) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_dir / "status.json").write_text('{"state": "done", "ranks": 4}')
    rows: list[dict[str, float]] = []
    for step in range(1, 61):
        row = {"step": step, "tokens": 2000 * step, "loss_main": loss + 5 / step}
        row |= {"tokens_per_second": 1234.0, "step_seconds": 1.5, "grad_norm": 1 + 1 / step}
        row |= {"model_flops_utilization": 0.4321}
        if step % 10 == 0:
            row |= {f"mhc/site_{site:03d}/gain_forward": 1 + site * step / 9 for site in range(6)}
        rows.append(row)
    rows[-1]["validation/loss"] = loss + 0.25
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = np.random.default_rng(0).poisson(50.0, (3, 16)).astype(float)
    (run_dir / "expert_load.jsonl").write_text(json.dumps(encode(60, counts)) + "\n")
    append_event(run_dir, step=30, rank=0, event="resume", detail="4 ranks on cpu")
    append_event(run_dir, step=40, rank=0, event="alarm", detail="spike: grad_norm = 9, above 5")
    return run_dir


def two_runs(folder: Path) -> list[Path]:
    other = {"name": "b", "model": {"residual": "mhc", "engram": None}, "train": RECIPE["train"]}
    return [write_run(folder / "a|<b>", RECIPE, 2.0), write_run(folder / "off", other, 3.0)]


def test_a_report_says_what_differs_and_what_came_out(tmp_path: Path) -> None:
    page = write_report(two_runs(tmp_path), tmp_path / "out" / "report")
    final = sum(5 / step for step in range(51, 61)) / 10
    text = (page.parent / "report.md").read_text()
    hours = f"{60 * 1.5 * 4 / 3600:.3g}"
    numbers = f"60 | 120,000 | {2 + final:.4f} | 2.2500 | 1,234 | 43.2% | {hours} | 1 | 1 |"
    assert f"| a\\|<b> | done | {numbers}" in text
    assert f"| off | done | 60 | 120,000 | {3 + final:.4f} | 3.2500 |" in text
    assert "off differs from a|<b> in model.engram=null." in text
    assert f"| grad_norm | {1 + final / 5:.5g} | {1 + final / 5:.5g} |" in text
    assert "Events: 2 alarm, 2 resume" in text
    assert "| off | 40 | alarm | spike: grad_norm = 9, above 5 |" in text
    for name in ("loss", "metrics", "heat-0", "heat-1"):
        assert f"]({name}.png)" in text


def test_the_html_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    page = write_report(two_runs(tmp_path), tmp_path / "report")
    text = page.read_text()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    names = ("loss", "metrics", "heat-0", "heat-1")
    files = [(page.parent / f"{name}.png").read_bytes() for name in names]
    assert [base64.b64decode(data) for data in found] == files
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "a|&lt;b&gt;" in text
    assert "<b>" not in text


def test_heat_maps_show_the_sites_in_colours(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "a", RECIPE, 2.0)], tmp_path / "report")
    picture = imread(page.parent / "heat-0.png")[..., :3]
    red, blue = picture[..., 0] - picture[..., 2], picture[..., 2] - picture[..., 0]
    assert (red > 0.4).sum() > 5000  # gains far above 1
    assert len(np.unique(picture[red > 0.1].round(2), axis=0)) > 10
    assert (blue > 0.1).sum() > 500  # experts below the mean


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_browser_opens_it_from_the_disk_alone(tmp_path: Path) -> None:
    page = write_report(two_runs(tmp_path), tmp_path / "report")
    with chromium_page() as watched:
        watched.page.goto(page.as_uri())
        sizes = watched.page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(sizes) == 4
        assert min(sizes) > 1000
        assert watched.page.locator("table").count() == 3
        assert watched.problems == []
        assert watched.requests == [page.as_uri()]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match=r"no records in metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"no readable recipe\.yaml"):
        write_report([tmp_path], tmp_path / "report")
