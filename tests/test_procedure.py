"""The paper's procedure on records whose answers are known: steps to a loss, optima, peaks and claims."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.fidelity.procedure import BATCH_SIZES, TARGETS
from benchmarks.fidelity.procedure_optima import (
    Optimum,
    best_to_target,
    claims,
    fit_tradeoff,
    log_steps,
    optimum,
    shape,
)
from benchmarks.fidelity.procedure_tables import claims_of, table

LRS = [2.0**exponent for exponent in range(-8, 1)]


def test_the_best_of_a_parabola_in_the_log_is_exact() -> None:
    rows = np.array([[(math.log2(lr) - best) ** 2 + 1.0 for lr in LRS] for best in (-4.2, -3.8)])
    found = optimum(16, LRS, rows)
    assert found.lr == pytest.approx(2.0**-4)
    # Of two bests 0.2 octaves on both sides, the standard error of the mean.
    assert found.error == pytest.approx(0.2 * math.log(2.0))
    assert found.values == pytest.approx([1.0, 1.0])
    assert not found.edge
    assert optimum(16, LRS, np.array([LRS, LRS])).edge


def test_steps_are_interpolated_in_the_log_from_the_lowest_loss_so_far() -> None:
    record = {
        "targets": [1.0],
        "steps": [10, 20, 40, 80],
        "losses": [[[3.0, 2.0, 2.5, 0.0], [3.0, 2.0, 2.0, 1.5]]],
    }
    steps = log_steps(record, 0)
    # Between 2, held over the third mark, and 0, the loss of 1 is half way from 40 to 80 in the log.
    assert math.exp(steps[0, 0]) == pytest.approx(math.sqrt(40 * 80))
    assert steps[0, 1] == math.inf


def test_a_learning_rate_that_misses_the_target_counts_as_its_last_step() -> None:
    losses = [[[3.0, 0.5], [3.0, 2.0]], [[3.0, 0.5], [3.0, 2.0]]]
    record = {"batch_size": 4, "targets": [1.0], "lrs": [0.1, 0.2], "steps": [10, 20], "losses": losses}
    (found,) = best_to_target([record], 0)
    assert found.lr == pytest.approx(0.1)
    missed = record | {"losses": [[[3.0, 2.0]] * 2] * 2}
    assert best_to_target([missed], 0) == []


def optima(*lrs: float, error: float = 0.01) -> list[Optimum]:
    return [Optimum(size, lr, error, False, [0.0]) for size, lr in zip(BATCH_SIZES, lrs, strict=False)]


def test_a_peak_is_between_the_batch_sizes_tried_or_beyond_them() -> None:
    found = shape(optima(1.0, 2.0, 4.0, 2.0, 1.0))
    assert (round(found.peak), found.rises, found.falls) == (64, True, True)
    assert shape(optima(1.0, 2.0, 4.0)).peak == math.inf
    assert shape(optima(4.0, 2.0, 1.0)).peak == 0.0
    # A fall within the errors is none.
    assert not shape(optima(1.0, 2.0, 4.0, 3.9, error=0.1)).falls


def test_the_line_of_a_law_gives_its_noise_scale_back() -> None:
    """S = 100 (1 + 50 / B) steps of every seed."""
    steps = {size: [100.0 * (1.0 + 50.0 / size)] * 3 for size in BATCH_SIZES}
    found = fit_tradeoff(steps, draws=10)
    assert found["noise_scale"][0] == pytest.approx(50.0, rel=1e-6)
    assert found["min_steps"][0] == pytest.approx(100.0, rel=1e-6)
    assert found["min_examples"] == pytest.approx([5000.0, 0.0], rel=1e-6, abs=1e-6)


def following(target: int, peak: int, said: float | None) -> dict[str, Any]:
    """The best learning rate is largest at one batch size; the callback says its own."""
    losses = {}
    for index, size in enumerate(BATCH_SIZES):
        best = -4.0 - abs(index - BATCH_SIZES.index(peak))
        losses[str(size)] = [[(math.log2(lr) - best) ** 2 + 0.001 * seed for lr in LRS] for seed in range(2)]
    key = {"workload": "perceptron", "beta_1": 0.0, "beta_2": 0.0, "target": target, "loss": 2.0 - target}
    lrs = {str(size): [0.01, 0.001] for size in BATCH_SIZES}
    callback = {"lrs": lrs, "peak_batch_size": [said, None], "critical_batch_size": [30.0, 1.0]}
    return key | {"steps": 16, "lrs": LRS, "losses": losses, "callback": callback}


def test_claims_are_counted_from_target_to_target() -> None:
    records = {
        "procedure_following": [following(0, 16, None), following(1, 64, 100.0), following(2, 64, 40.0)]
    }
    assert len(TARGETS) == 3
    found = claims(records)
    counts = {"cases": 3, "rises_and_falls": 3, "pairs": 2, "moves_up": 1, "moves_down": 0, "stays": 1}
    assert found["following"] == counts
    # None within the range, then 100 examples, then 40.
    counts = {"cases": 3, "rises_and_falls": 2, "pairs": 2, "moves_up": 0, "moves_down": 2, "stays": 0}
    assert found["callback"] == counts
    assert found["runs"]["cases"] == 0
    assert claims_of(records)["0, 0"] == found
    assert claims_of(records)["0.9, 0.999"]["following"]["cases"] == 0


def test_the_table_has_a_row_for_the_steps_and_one_for_the_callback() -> None:
    page = table({"procedure_following": [following(0, 64, 100.0)]})
    lrs = "0.016 | 0.031 | 0.062 | 0.031 | 0.016"
    assert f"| perceptron | 0, 0 | 2.000 | following 16 steps | {lrs} | 64 |  |" in page
    assert "| callback | 0.01 | 0.01 | 0.01 | 0.01 | 0.01 | 100 ± ? | 30 ± 1 |" in page
    assert "| 0, 0 | following steps | 1 | 1 | 0 | 0 | 0 | 0 |" in page
