import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train.expert_load import ExpertLoad, decode, encode
from train.metrics import MetricsLog


def test_a_row_holds_every_load_within_half_a_hundredth() -> None:
    counts = np.random.default_rng(0).poisson(90.0, (3, 16)).astype(float)
    counts[1, 2] = 0
    row = json.loads(json.dumps(encode(40, counts)))
    assert (row["step"], row["layers"], row["experts"]) == (40, 3, 16)
    expected = counts / counts.mean(axis=1, keepdims=True)
    assert np.abs(decode(row) - expected).max() <= 0.005 + 1e-12
    assert decode(row)[1, 2] == 0


def test_rows_of_a_trillion_parameter_model_stay_small() -> None:
    counts = np.random.default_rng(0).poisson(700.0, (61, 384)).astype(float)
    assert len(json.dumps(encode(1, counts))) < 1.4 * 61 * 384


def test_no_tokens_at_all_is_no_division_by_zero() -> None:
    assert (decode(encode(1, np.zeros((2, 4)))) == 0).all()


def test_counts_are_taken_once() -> None:
    load = ExpertLoad()
    assert load.take() is None
    load.keep(torch.tensor([[1, 2], [3, 4]]))
    taken = load.take()
    assert taken is not None
    assert taken.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert load.take() is None


def test_rows_after_the_restored_step_are_cut_off(tmp_path: Path) -> None:
    counts = np.ones((1, 2))
    with MetricsLog(tmp_path, [], restored_step=0) as log:
        for step in (2, 4):
            log.write_expert_load(step, counts)
        log.write_expert_load(5, None)
    with MetricsLog(tmp_path, [], restored_step=3) as log:
        log.write_expert_load(4, 2 * counts)
    rows = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["load"] == rows[1]["load"]  # relative to the mean


@pytest.mark.parametrize("largest", [655.35, 700.0])
def test_the_largest_load_is_a_bound(largest: float) -> None:
    counts = np.zeros((1, 1000))
    counts[0, 0] = largest
    counts[0, 1:] = (1000 - largest) / 999  # the mean is 1
    assert decode(encode(1, counts))[0, 0] == pytest.approx(655.35)
