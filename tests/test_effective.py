"""A noise scale by factors: that the right one has no error."""

from typing import Any

import pytest

from benchmarks.fidelity.effective import FACTORS, effective_rows
from benchmarks.fidelity.regrets import DEFAULT, mccandlish

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "late"}


def test_the_factor_that_made_the_truth_has_no_error() -> None:
    truths = [POINT | {"batch_size": size, "ratio": mccandlish(4.0 * 48.0, size)} for size in (2, 64)]
    lives = [POINT | DEFAULT | {"seed": seed, "noise_scale": 48.0} for seed in range(2)]
    # A run without a measurement, one at another cost, and one of another point take no part.
    lives += [POINT | DEFAULT, POINT | DEFAULT | {"max_overhead": 0.25, "noise_scale": 1.0}]
    lives += [POINT | DEFAULT | {"phase": "early", "noise_scale": 1.0}]
    rows = effective_rows(truths, lives)
    assert len(rows) == 2 * len(FACTORS)
    assert [row["error"] for row in rows if row["factor"] == 4.0] == pytest.approx([0.0, 0.0])
    # A smaller noise scale saturates earlier: nearer to 1 on both sides.
    assert [row["error"] > 0 for row in rows if row["factor"] == 1.0] == [True, False]


def test_a_point_without_runs_has_no_row() -> None:
    assert effective_rows([POINT | {"batch_size": 64, "ratio": 1.0}], []) == []


def test_an_infinite_noise_scale_is_sqrt_scaling() -> None:
    lives = [POINT | DEFAULT | {"seed": 0, "noise_scale": None}]
    rows = effective_rows([POINT | {"batch_size": 64, "ratio": 1.0}], lives)
    assert {row["error"] for row in rows} == {0.0}
